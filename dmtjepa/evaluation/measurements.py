"""The measurements of a report: one function for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.collapse import CollapseNumbers, collapse_numbers
from dmtjepa.evaluation.context import EvaluationContext
from dmtjepa.evaluation.errors import NotMeasuredError
from dmtjepa.evaluation.features import LAYOUT_SIDE, Features, extract_features, extract_patches, extract_pixels
from dmtjepa.evaluation.knn import knn_accuracy, standardize
from dmtjepa.evaluation.linear import fit_linear
from dmtjepa.evaluation.segmentation import find_mask, read_mask, score_segmentation
from dmtjepa.evaluation.splits import subsample
from dmtjepa.step_csv import LossCurve

NUM_SEGMENTED = 300
"""Images of each split whose patches are segmented."""
LAYOUT_BYTES = 8 * 2**30
"""Memory limit of features with layout, which are up to 16 times as large as pooled features."""
MAX_RANKED = 25_600
"""Images that collapse numbers are computed from; RankMe uses as many."""

FeatureSets = Mapping[str, Features]
"""Features of the images of one split, by name: `trained`, `untrained` or `pixels`."""


def layout_bytes(context: EvaluationContext) -> int:
    """Memory that features with layout take, in bytes: float32, both encoders, all images."""
    num_fields = math.prod(min(LAYOUT_SIDE, side) for side in context.config.grid_size)
    num_images = len(context.splits.train) + len(context.splits.validation)
    return 2 * 4 * num_fields * context.encoders["trained"].embed_dim * num_images


def extract_split(context: EvaluationContext, source: ImageSource, split: str, *, layout: bool) -> dict[str, Features]:
    """Features of all images of a split, for each encoder. `split` is its name in the progress bar."""
    return {
        name: extract_features(
            encoder,
            context.build_loader(source),
            device=context.device,
            grid_size=context.config.grid_size if layout else None,
            description=f"{name}, {split}",
            progress=context.progress,
        )
        for name, encoder in context.encoders.items()
    }


def extract_split_pixels(context: EvaluationContext, source: ImageSource) -> Features:
    """Raw pixels of all images of a split, as features."""
    return extract_pixels(context.build_loader(source))


def measure_collapse(validation: FeatureSets) -> dict[str, CollapseNumbers]:
    """Collapse numbers of the pooled features. Empty if there are fewer than two images."""
    return {
        name: collapse_numbers(features.pooled[:MAX_RANKED])
        for name, features in validation.items()
        if len(features.pooled) > 1
    }


def measure_knn(
    train: FeatureSets,
    validation: FeatureSets,
    neighbors: Sequence[int],
    *,
    weighted: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, dict[int, float]]:
    """k-NN accuracy of pooled features for each k of `neighbors`, by name of the features."""
    accuracy = {}
    for name, features in validation.items():
        gallery, queries = train[name].pooled, features.pooled
        if name != "pixels":  # pixels have the mean of their image subtracted already; standardised they do worse
            gallery, queries = standardize(gallery, queries)
        accuracy[name] = knn_accuracy(
            gallery,
            _labels(train[name]),
            queries,
            _labels(features),
            num_neighbors=neighbors,
            weighted=weighted,
            device=device,
        )
    return accuracy


def measure_knn_layout(
    train: FeatureSets, validation: FeatureSets, neighbors: Sequence[int], *, device: torch.device | str = "cpu"
) -> dict[str, dict[int, float]]:
    """k-NN accuracy of the features with layout, for the names that have them."""
    accuracy = {}
    for name, features in validation.items():
        train_layout = train[name].layout
        if train_layout is not None and features.layout is not None:
            gallery, queries = standardize(train_layout, features.layout)
            accuracy[name] = knn_accuracy(
                gallery, _labels(train[name]), queries, _labels(features), num_neighbors=neighbors, device=device
            )
    return accuracy


def measure_linear(
    train: FeatureSets, validation: FeatureSets, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Accuracy of a linear probe of the pooled features, for all names but `pixels`."""
    accuracy = {}
    for name, features in validation.items():
        if name != "pixels":
            probe = fit_linear(train[name].pooled, _labels(train[name]), device=device)
            accuracy[name] = probe.accuracy(features.pooled, _labels(features))
    return accuracy


def measure_segmentation(context: EvaluationContext) -> dict[str, dict[str, float]]:
    """Scores of a linear probe of patches against pixel masks, by name of the encoder.

    Raises:
        NotMeasuredError: there are no masks.
    """
    sources = [subsample(source, NUM_SEGMENTED) for source in (context.splits.train, context.splits.validation)]
    if any(find_mask(source.name(0)) is None for source in sources):
        raise NotMeasuredError("segmentation: there are no pixel masks beside the images (see docs/evaluation.md)")
    (train_images, train_masks), (images, masks) = (_load_masked(context, source) for source in sources)
    scores = {}
    for name, encoder in context.encoders.items():
        train_patches, patches = (
            torch.cat([extract_patches(encoder, batch, device=context.device) for batch in batches])
            for batches in (train_images, images)
        )
        scores[name] = asdict(
            score_segmentation(
                train_patches, train_masks, patches, masks, context.config.grid_size, device=context.device
            )
        )
    return scores


def summarize_loss(curve: LossCurve) -> dict[str, float]:
    """Number of logged steps, and the mean loss of the first and of the last fiftieth of them. Empty without steps."""
    if not len(curve.loss):
        return {}
    window = max(1, len(curve.loss) // 50)
    return {
        "steps": len(curve.loss),
        "first": float(np.mean(curve.loss[:window])),
        "last": float(np.mean(curve.loss[-window:])),
    }


def _load_masked(context: EvaluationContext, source: ImageSource) -> tuple[list[Tensor], Tensor]:
    """Batches of images uint8 [b,3,H,W], and the masks [n,H,W] of all of them. Images without a mask are left out."""
    images, masks = [], []
    for batch, _, names in context.build_loader(source):
        paths = [find_mask(name) for name in names]
        images.append(batch[[i for i, path in enumerate(paths) if path is not None]])
        masks += [read_mask(path, context.config.data.image_size) for path in paths if path is not None]
    return images, torch.stack(masks)


def _labels(features: Features) -> Tensor:
    assert features.labels is not None, "only labelled splits are classified"
    return features.labels
