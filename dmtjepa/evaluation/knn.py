"""Accuracy of k-nearest-neighbour classification, the simplest measure of a representation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
"""Temperature of the weights exp(similarity / temperature): Wu et al. (arXiv 1805.01978), DINO (arXiv 2104.14294)."""

DINO_NEIGHBORS = (10, 20, 100, 200)
"""k of the k-NN accuracies in DINO."""

SIMILARITIES = 2**26
"""Similarities computed at once, 256 MB in float32; queries are split into chunks accordingly."""


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    num_neighbors: Sequence[int] = (5, 10, 20),
    weighted: bool = True,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Share of queries (0 to 1) whose class gets most votes of the k most similar training images, for each k.

    Similarity is the cosine. A weighted vote counts exp(similarity / temperature), as in DINO; a plain vote counts 1.
    A tie goes to the lower class.

    Args:
        train_features: float [n,D].
        train_labels: int64 [n], classes from 0.
        features: float [m,D], the queries.
        labels: int64 [m].
        num_neighbors: each k.
        weighted: votes count by similarity.
        temperature: of the weights.
        device: where it computes.

    Raises:
        ValueError: a k is less than 1, or larger than the training set.
    """
    num_train = len(train_features)
    if min(num_neighbors) < 1 or max(num_neighbors) > num_train:
        raise ValueError(
            f"k-NN with k={tuple(num_neighbors)} needs k from 1 to the size of the training set, which is {num_train}; "
            f"set evaluation.neighbors"
        )
    train_features = F.normalize(train_features.to(device).float(), dim=1)
    train_labels = train_labels.to(device)
    features = F.normalize(features.to(device).float(), dim=1)
    labels = labels.to(device)
    num_classes = int(max(train_labels.max(), labels.max())) + 1
    correct = dict.fromkeys(num_neighbors, 0)
    chunk = max(1, SIMILARITIES // num_train)
    for queries, query_labels in zip(features.split(chunk), labels.split(chunk), strict=True):
        similarity, neighbor_index = (queries @ train_features.T).topk(max(num_neighbors), dim=1)
        votes = train_labels[neighbor_index]
        # Subtracting the largest similarity keeps the ranking and prevents overflow at low temperatures.
        weight = ((similarity - similarity[:, :1]) / temperature).exp() if weighted else torch.ones_like(similarity)
        for k in num_neighbors:
            score = weight.new_zeros(len(queries), num_classes).scatter_add_(1, votes[:, :k], weight[:, :k])
            correct[k] += int((score.argmax(1) == query_labels).sum())
    return {k: count / len(features) for k, count in correct.items()}


def standardize(train_features: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise [n,D] and [m,D] with the mean and standard deviation of the training features in each dimension.

    Averages over patches share a large constant, since all images have the same positions. It would make all cosines
    nearly 1.
    """
    std, mean = torch.std_mean(train_features, dim=0, correction=0)
    scale = std.clamp_min(1e-6)
    return (train_features - mean) / scale, (features - mean) / scale
