"""The measurements of a report: one function for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.attentive import fit_attentive
from dmtjepa.evaluation.collapse import CollapseNumbers, collapse_numbers
from dmtjepa.evaluation.context import EvaluationContext
from dmtjepa.evaluation.errors import EvaluationError, NotMeasuredError
from dmtjepa.evaluation.features import LAYOUT_SIDE, Features, extract_features, extract_patches, extract_pixels
from dmtjepa.evaluation.knn import DINO_NEIGHBORS, knn_accuracy, standardize
from dmtjepa.evaluation.linear import MIN_ROWS, fit_linear
from dmtjepa.evaluation.low_shot import measure_low_shot
from dmtjepa.evaluation.segmentation import (
    SegmentationScores,
    SegmentedImages,
    find_masked,
    read_masks,
    segment,
)
from dmtjepa.evaluation.splits import subsample
from dmtjepa.models import VisionTransformer
from dmtjepa.models.vit import patchify
from dmtjepa.step_csv import LossCurve

LAYOUT_BYTES = 8 * 2**30
"""Memory limit of features with layout, which are up to 16 times as large as pooled features."""
MAX_RANKED = 25_600
"""Images that collapse numbers are computed from; RankMe uses as many."""

NUM_LAYERS = 4
"""Blocks whose averages are concatenated for one of I-JEPA's linear probes."""
ATTENTIVE_BYTES = 2**30
"""Memory limit of the patch features of a split for attentive probes, which take fewer images if it is exceeded."""

FeatureSets = Mapping[str, Features]
"""Features of the images of one split, by name: `trained`, `student`, `untrained` or `pixels`."""


def layout_bytes(context: EvaluationContext) -> int:
    """Memory that features with layout take, in bytes: float32, all encoders, all images."""
    num_fields = math.prod(min(LAYOUT_SIDE, side) for side in context.config.grid_size)
    num_images = len(context.splits.train) + len(context.splits.validation)
    return len(context.encoders) * 4 * num_fields * context.encoders["trained"].embed_dim * num_images


def extract_split(context: EvaluationContext, source: ImageSource, split: str, *, layout: bool) -> dict[str, Features]:
    """Features of all images of a split, for each encoder. `split` is its name in the progress bar.

    Raises:
        EvaluationError: no image can be read, or features are not finite.
    """
    sets = {}
    for name, encoder in context.encoders.items():
        features = extract_features(
            encoder,
            context.build_loader(source),
            device=context.device,
            num_layers=1 if context.quick else min(NUM_LAYERS, len(encoder.blocks)),
            grid_size=context.config.grid_size if layout else None,
            description=f"{name}, {split}",
            progress=context.progress,
        )
        pooled, blocks = features.pooled[:, -encoder.embed_dim :], None if context.quick else features.pooled
        sets[name] = Features(pooled, features.labels, features.layout, blocks)
    for name, features in sets.items():
        if not features.pooled.isfinite().all():
            raise EvaluationError(
                f"features of the {name} encoder are not finite; give {context.options.checkpoint} an earlier file"
            )
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
    """Accuracy of a linear probe of the pooled features.

    Raises:
        NotMeasuredError: there are too few training images.
    """
    num_train = min(len(features.pooled) for features in train.values())
    if num_train < MIN_ROWS:
        raise NotMeasuredError(f"linear probe: it needs at least {MIN_ROWS} training images, not {num_train}")
    accuracy = {}
    for name, features in validation.items():
        probe = fit_linear(train[name].pooled, _labels(train[name]), device=device)
        accuracy[name] = probe.accuracy(features.pooled, _labels(features))
    return accuracy


def measure_protocols(
    train: FeatureSets,
    validation: FeatureSets,
    linear: Mapping[str, float],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Accuracies by the protocols of papers: protocol -> name of the encoder -> accuracy.

    I-JEPA (arXiv 2301.08243, appendix A) fits linear probes to averages of the last layer, which are `linear`, and to
    those of the last four layers. DINO (arXiv 2104.14294) classifies by weighted k-NN of features that are
    normalised and not standardised.
    """
    accuracy: dict[str, dict[str, float]] = {}
    for name, features in validation.items():
        gallery = train[name]
        if name in linear:
            accuracy.setdefault("I-JEPA linear probe, last layer", {})[name] = linear[name]
        if features.blocks is not None and gallery.blocks is not None and len(gallery.blocks) >= MIN_ROWS:
            num_layers = features.blocks.shape[1] // features.pooled.shape[1]
            probe = fit_linear(gallery.blocks, _labels(gallery), device=device)
            protocol = f"I-JEPA linear probe, last {num_layers} layers"
            accuracy.setdefault(protocol, {})[name] = probe.accuracy(features.blocks, _labels(features))
        neighbors = [k for k in DINO_NEIGHBORS if k <= len(gallery.pooled)]
        if neighbors:
            found = knn_accuracy(
                gallery.pooled,
                _labels(gallery),
                features.pooled,
                _labels(features),
                num_neighbors=neighbors,
                device=device,
            )
            for k, value in found.items():
                accuracy.setdefault(f"DINO k-NN, k = {k}", {})[name] = value
    return accuracy


def measure_few_labels(
    train: FeatureSets, validation: FeatureSets, *, device: torch.device | str = "cpu"
) -> dict[str, dict[str, dict[str, float]]]:
    """Low-shot scores: which labels -> name of the features -> mean, standard deviation, number of images."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, features in validation.items():
        found = measure_low_shot(
            train[name].pooled, _labels(train[name]), features.pooled, _labels(features), device=device
        )
        for labels, score in found.items():
            scores.setdefault(labels, {})[name] = asdict(score)
    return scores


def measure_attentive(context: EvaluationContext) -> dict[str, float]:
    """Accuracy of attentive probes of patch features, by name of the encoder.

    Raises:
        NotMeasuredError: there are too few training images.
    """
    accuracy = {}
    rows, columns = context.config.grid_size
    for name, encoder in context.encoders.items():
        most = ATTENTIVE_BYTES // (4 * rows * columns * encoder.embed_dim)
        splits = []
        for source in (context.splits.train, context.splits.validation):
            patches, labels = [], []
            for images, batch_labels, _ in context.build_loader(subsample(source, most)):
                patches.append(extract_patches(encoder, images, device=context.device))
                assert batch_labels is not None, "only labelled splits are classified"
                labels.append(batch_labels)
            splits.append((torch.cat(patches), torch.cat(labels)))
        try:
            probe = fit_attentive(*splits[0], device=context.device)
        except EvaluationError as error:
            raise NotMeasuredError(f"attentive probe: {error}") from error
        accuracy[name] = probe.accuracy(*splits[1])
    return accuracy


def measure_segmentation(
    context: EvaluationContext, *, num_shown: int
) -> tuple[dict[str, SegmentationScores], SegmentedImages]:
    """Scores of a linear probe of patches against pixel masks, by name of the encoder, and of the pixels of patches.

    Args:
        num_shown: so many images, evenly spaced, are returned with what was predicted.

    Raises:
        NotMeasuredError: there are no masks, or they cannot be used.
    """
    train, validation = (find_masked(source) for source in (context.splits.train, context.splits.validation))
    if not len(train) or not len(validation):
        raise NotMeasuredError("segmentation: there are no pixel masks beside the images (see docs/evaluation.md)")
    scores, predicted = {}, {}
    try:
        (train_images, train_masks), (images, masks) = (_load_masked(context, split) for split in (train, validation))
        shown = np.unique(np.linspace(0, len(masks) - 1, num_shown).round().astype(int))
        for name, encoder in [*context.encoders.items(), ("pixels", None)]:
            train_patches, patches = (
                torch.cat([_encode_patches(context, encoder, batch) for batch in batches])
                for batches in (train_images, images)
            )
            grid_size = context.config.grid_size
            found = segment(train_patches, train_masks, patches, masks, grid_size, device=context.device)
            scores[name] = found.scores
            if name != "student":  # it looks as the teacher does
                predicted[name] = found.predicted[shown]
    except (EvaluationError, OSError) as error:
        raise NotMeasuredError(f"segmentation: {error}") from error
    return scores, SegmentedImages(torch.cat(images)[shown], masks[shown], predicted)


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
        masks.append(read_masks(names, context.config.data.image_size))
    if not images:
        raise EvaluationError("no image that has a mask could be read")
    return images, torch.cat(masks)


def _encode_patches(context: EvaluationContext, encoder: VisionTransformer | None, images: Tensor) -> Tensor:
    """Patch features float32 [b,N,D] of images uint8 [b,3,H,W]; without an encoder, the pixels of the patches."""
    if encoder is None:
        return patchify(images.float() / 255, context.config.mask.patch_size)
    return extract_patches(encoder, images, device=context.device)


def _labels(features: Features) -> Tensor:
    assert features.labels is not None, "only labelled splits are classified"
    return features.labels
