"""Low-shot classification: linear probes of few labelled images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmtjepa.evaluation.linear import MIN_ROWS, fit_linear

SHARES = {"1%": 0.01, "10%": 0.1}
"""Shares of the training images: those of each class, rounded up."""
PER_CLASS = {"5 per class": 5, "20 per class": 20}
NUM_DRAWS = 3


@dataclass(frozen=True)
class LowShotScore:
    """Accuracy of linear probes of few images: mean and standard deviation over the draws of these images.

    num_images: in each draw.
    """

    mean: float
    std: float
    num_images: int


def measure_low_shot(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    device: torch.device | str = "cpu",
) -> Mapping[str, LowShotScore]:
    """Linear probes of 1% and 10% of the training images, and of 5 and 20 per class; three draws each.

    What is left out: draws of fewer than 10 images, and of more than there are.

    Args:
        train_features: float [n,D]. train_labels: int64 [n].
        features: float [m,D], which the probes classify. labels: int64 [m].
    """
    sizes = np.bincount(train_labels.numpy())
    counts = {name: np.ceil(share * sizes).astype(int) for name, share in SHARES.items()}
    counts |= {name: np.minimum(count, sizes) for name, count in PER_CLASS.items() if count <= sizes[sizes > 0].min()}
    scores = {}
    for name, per_class in counts.items():
        if not MIN_ROWS <= per_class.sum() <= len(train_labels):
            continue
        accuracies = []
        for seed in range(NUM_DRAWS):
            chosen = draw_per_class(train_labels.numpy(), per_class, seed)
            probe = fit_linear(train_features[chosen], train_labels[chosen], device=device)
            accuracies.append(probe.accuracy(features, labels))
        scores[name] = LowShotScore(
            math.fsum(accuracies) / NUM_DRAWS, statistics.stdev(accuracies), int(per_class.sum())
        )
    return scores


def draw_per_class(labels: np.ndarray, per_class: np.ndarray, seed: int) -> Tensor:
    """Numbers int64 [sum] of `per_class[label]` images of each class, drawn without repetition, in their order."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(per_class.tolist())]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))
