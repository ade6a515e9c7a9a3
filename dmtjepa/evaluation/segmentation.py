"""Do patch features tell which object a patch shows? A linear probe of patches against pixel masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmtjepa.data.crop import crop_center
from dmtjepa.evaluation.linear import fit_linear

MAX_PATCHES = 20_000
"""Patches the probe is fitted to, drawn from those of the training images."""


@dataclass(frozen=True)
class SegmentationScores:
    """Shares from 0 to 1: IoU averaged over classes with the ground as one, and IoU of object against ground."""

    mean_iou: float
    object_iou: float


def find_mask(image: str | Path) -> Path | None:
    """The mask of <root>/<split>/<class>/<name>.jpg: <root>/masks/<split>/<class>/<name>.png, if it exists."""
    image = Path(image)
    if len(image.parts) < 4:
        return None
    mask = image.parents[2] / "masks" / image.parts[-3] / image.parts[-2] / f"{image.stem}.png"
    return mask if mask.is_file() else None


def read_mask(path: Path, image_size: tuple[int, int]) -> Tensor:
    """A mask cut as the evaluation cuts its image: int64 [H,W], 0 the ground, from 1 the classes."""
    with Image.open(path) as image:
        # Pillow resizes images with a palette to the nearest pixel, so no class is mixed of two others.
        mask = image if image.mode == "P" else image.convert("L").convert("P")
        return torch.from_numpy(crop_center(mask, image_size).astype(np.int64))


def label_patches(masks: Tensor, grid_size: tuple[int, int], num_classes: int) -> Tensor:
    """The most frequent class of every patch: masks int64 [n,H,W] -> int64 [n,N]; a tie goes to the lower class."""
    share = F.one_hot(masks, num_classes).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(share, grid_size).argmax(1).flatten(1)


def score_segmentation(
    train_patches: Tensor,
    train_masks: Tensor,
    patches: Tensor,
    masks: Tensor,
    grid_size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
) -> SegmentationScores:
    """Fit a linear probe to training patches, and compare its predictions with masks, pixel by pixel.

    Args:
        train_patches: float [n,N,D]. train_masks: int64 [n,H,W].
        patches: float [m,N,D]. masks: int64 [m,H,W].
        grid_size: rows and columns, N in all.
    """
    num_classes = 1 + int(max(train_masks.max(), masks.max()))
    rows = train_patches.flatten(0, 1)
    labels = label_patches(train_masks, grid_size, num_classes).flatten()
    if len(rows) > MAX_PATCHES:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_PATCHES]
        rows, labels = rows[chosen], labels[chosen]
    probe = fit_linear(rows, labels, device=device)
    predicted = probe.predict(patches.flatten(0, 1)).cpu().view(len(patches), 1, *grid_size)
    predicted = F.interpolate(predicted.float(), size=masks.shape[-2:], mode="nearest")[:, 0].long()
    ious = [_iou(predicted == label, masks == label) for label in range(num_classes)]
    present: Sequence[float] = [iou for iou in ious if iou is not None]
    return SegmentationScores(sum(present) / len(present), _iou(predicted > 0, masks > 0) or 0.0)


def _iou(predicted: Tensor, truth: Tensor) -> float | None:
    """Intersection over union; None where neither has the class."""
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else None
