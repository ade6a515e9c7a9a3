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
from dmtjepa.evaluation.errors import EvaluationError, NotMeasuredError
from dmtjepa.evaluation.features import LAYOUT_SIDE, Features, extract_features, extract_patches, extract_pixels
from dmtjepa.evaluation.knn import knn_accuracy, standardize
from dmtjepa.evaluation.linear import MIN_ROWS, fit_linear
from dmtjepa.evaluation.segmentation import find_mask, find_masked, read_mask, score_segmentation
from dmtjepa.step_csv import LossCurve

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
    """Features of all images of a split, for each encoder. `split` is its name in the progress bar.

    Raises:
        EvaluationError: no image can be read, or features are not finite.
    """
    sets = {
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
    for name, features in sets.items():
        if not features.pooled.isfinite().all():
            raise EvaluationError(f"features of the {name} encoder are not finite; measure an earlier --checkpoint")
    return sets


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
    """Accuracy of a linear probe of the pooled features, for all names but `pixels`.

    Raises:
        NotMeasuredError: there are too few training images.
    """
    num_train = min(len(features.pooled) for features in train.values())
    if num_train < MIN_ROWS:
        raise NotMeasuredError(f"linear probe: it needs at least {MIN_ROWS} training images, not {num_train}")
    accuracy = {}
    for name, features in validation.items():
        if name != "pixels":
            probe = fit_linear(train[name].pooled, _labels(train[name]), device=device)
            accuracy[name] = probe.accuracy(features.pooled, _labels(features))
    return accuracy


def measure_segmentation(context: EvaluationContext) -> dict[str, dict[str, float]]:
    """Scores of a linear probe of patches against pixel masks, by name of the encoder.

    Raises:
        NotMeasuredError: there are no masks, or they cannot be used.
    """
    train, validation = (find_masked(source) for source in (context.splits.train, context.splits.validation))
    if not len(train) or not len(validation):
        raise NotMeasuredError("segmentation: there are no pixel masks beside the images (see docs/evaluation.md)")
    scores = {}
    try:
        (train_images, train_masks), (images, masks) = (_load_masked(context, split) for split in (train, validation))
        for name, encoder in context.encoders.items():
            train_patches, patches = (
                torch.cat([extract_patches(encoder, batch, device=context.device) for batch in batches])
                for batches in (train_images, images)
            )
            grid_size = context.config.grid_size
            scores[name] = asdict(
                score_segmentation(train_patches, train_masks, patches, masks, grid_size, device=context.device)
            )
    except (EvaluationError, OSError) as error:
        raise NotMeasuredError(f"segmentation: {error}") from error
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
    """Batches of images uint8 [b,3,H,W], and the masks uint8 [n,H,W] of all of them."""
    images, masks = [], []
    for batch, _, names in context.build_loader(source):
        images.append(batch)
        for name in names:
            path = find_mask(name)
            assert path is not None
            masks.append(read_mask(path, context.config.data.image_size))
    if not images:
        raise EvaluationError("no image that has a mask could be read")
    return images, torch.stack(masks)


def _labels(features: Features) -> Tensor:
    assert features.labels is not None, "only labelled splits are classified"
    return features.labels
