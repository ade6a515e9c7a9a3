"""Collecting what the figures of a report show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.config import Config
from dmtjepa.evaluation.context import EvaluationContext, build_split_loader
from dmtjepa.evaluation.features import average_patches, extract_patches
from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.retrieval import FeaturedImages, find_nearest
from dmtjepa.evaluation.segmentation import SegmentedImages
from dmtjepa.evaluation.splits import subsample
from dmtjepa.kernels import select_neighbors
from dmtjepa.masks import MaskSampler
from dmtjepa.step_csv import LossCurve

NUM_SHOWN = 5
"""Images in a row of a figure."""
NUM_CENTERED = 200
"""Images whose mean patch feature at each position is subtracted before the principal components are computed."""


def collect_figure_data(
    context: EvaluationContext,
    *,
    loss: LossCurve | None,
    accuracy: Mapping[str, Mapping[int, float]],
    chance: float | None,
    segmented: SegmentedImages | None = None,
) -> FigureData:
    """Images of the validation split with their masks, neighbours and patch features; the rest is passed through.

    Args:
        loss: the loss curve of the run, None if it has none.
        accuracy: name of the features -> {k: k-NN accuracy}, empty if it was not measured.
        chance: share of the most frequent class.
        segmented: images with masks, None if there are none.
    """
    config = context.config
    images, labels, names = load_shown(context)
    if not names:  # all of these images are corrupt
        return FigureData(
            grid_size=config.grid_size, loss=loss, accuracy=accuracy or None, chance=chance, segmented=segmented
        )
    patches = {
        name: extract_patches(encoder, images, device=context.device) for name, encoder in context.encoders.items()
    }
    masks = MaskSampler.from_config(config, batch_size=len(images)).sample(step=0)
    query_index = neighbor_index = None
    if config.patch.local_agg_head:
        query_index = pick_queries(config.grid_size)
        neighbor_index = select_query_neighbors(patches["trained"], query_index, config)
    average = average_patches(patches["trained"])
    centered = {name: patches[name] - mean_patches(context, encoder) for name, encoder in context.encoders.items()}
    return FigureData(
        grid_size=config.grid_size,
        images=images,
        context_index=masks.contexts(config.grid_size[0] * config.grid_size[1]),
        target_index=masks.target_index,
        query_index=query_index,
        neighbor_index=neighbor_index,
        window=config.patch.patch_k_size,
        patches=centered["trained"],
        untrained_patches=centered.get("untrained"),
        loss=loss,
        accuracy=accuracy or None,
        chance=chance,
        segmented=segmented,
        names=names,
        labels=labels,
        features=average,
    )


def load_shown(context: EvaluationContext) -> tuple[Tensor, Tensor | None, list[str]]:
    """The images of the validation split that figures show: uint8 [B,3,H,W], labels [B] or None, and names [B].

    Those that are corrupt are left out.
    """
    batches = list(build_split_loader(subsample(context.splits.validation, NUM_SHOWN), context.config, context.corrupt))
    if not batches:
        return torch.empty(0), None, []
    images, labels, names = zip(*batches, strict=True)
    known = [part for part in labels if part is not None]
    return torch.cat(images), torch.cat(known) if known else None, [name for part in names for name in part]


def add_nearest(figures: FigureData, context: EvaluationContext, gallery: FeaturedImages) -> FigureData:
    """The same figures, and the nearest images of those that are shown.

    Raises:
        NotMeasuredError: as `find_nearest`.
    """
    if figures.names is None or figures.features is None:
        return figures
    labels = None if context.splits.unlabelled is not None else figures.labels
    return replace(figures, nearest=find_nearest(context, gallery, figures.features, figures.names, labels))


def pick_queries(grid_size: tuple[int, int]) -> Tensor:
    """Patches [Q] whose neighbours are shown: the middle of each quadrant; in large grids also the centre."""
    rows, columns = grid_size
    positions = [(r * rows // 4, c * columns // 4) for r in (1, 3) for c in (1, 3)]
    if min(grid_size) >= 12:
        positions.append((rows // 2, columns // 2))
    return torch.tensor([row * columns + column for row, column in positions])


def select_query_neighbors(patches: Tensor, query_index: Tensor, config: Config) -> Tensor:
    """Neighbours of the query patches, selected as in training.

    Args:
        patches: float [B,N,D]. query_index: int64 [Q].

    Returns:
        int64 [B,Q,K], most similar first; -1 where a window has fewer than K patches.
    """
    batch, num_patches, width = patches.shape
    h = F.layer_norm(patches, (width,))
    flat = (torch.arange(batch)[:, None] * num_patches + query_index).flatten()
    selected = select_neighbors(
        h,
        flat,
        config.grid_size,
        num_neighbors=config.patch.patch_k_num,
        window=config.patch.patch_k_size,
        border=config.patch.border,
    )
    return torch.where(selected >= 0, selected % num_patches, -1).view(batch, len(query_index), -1)


def mean_patches(context: EvaluationContext, encoder: nn.Module) -> Tensor:
    """Mean feature at each position of the grid, float32 [N,D]: the part that depends on the position alone."""
    total, count = torch.zeros(()), 0
    for images, _, _ in context.build_loader(subsample(context.splits.validation, NUM_CENTERED)):
        total = total + extract_patches(encoder, images, device=context.device).sum(0)
        count += len(images)
    return total / max(count, 1)
