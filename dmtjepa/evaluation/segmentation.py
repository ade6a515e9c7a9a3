"""Do patch features know which object a patch shows? A linear probe of patches, compared with pixel masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmtjepa.data.crop import crop_center
from dmtjepa.data.decode import read_upright_size
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.linear import MIN_ROWS, fit_linear
from dmtjepa.evaluation.splits import Subset, subsample

NUM_SEGMENTED = 300
"""Images of each split whose patches are segmented, at most."""
MAX_PATCHES = 20_000
"""Patches that the probe is fitted to, drawn from those of the training images."""
NUM_RESAMPLES = 200
"""Draws of the bootstrap."""
VOID = 255
"""Pixels of this value are of no class, as in PASCAL VOC and Cityscapes. They are neither learnt nor counted."""
MAX_DEPTH = 3
"""Folders between an image and the folder that holds `masks`, at most: the split, the class and one more."""


@dataclass(frozen=True)
class SegmentationScores:
    """From 0 to 1: IoU averaged over classes, the background being one; IoU of all objects against the background.

    mean_iou_error: standard error of `mean_iou`, by a bootstrap over the images.
    """

    mean_iou: float
    object_iou: float
    mean_iou_error: float


@dataclass(frozen=True)
class Segmentation:
    """Scores of m images, and the class of each patch that was predicted: int64 [m,rows,columns]."""

    scores: SegmentationScores
    predicted: Tensor


@dataclass(frozen=True)
class SegmentedImages:
    """Some images with what was predicted.

    images: uint8 [B,3,H,W]. masks: integers [B,H,W]. predicted: name of the features -> int64 [B,rows,columns].
    """

    images: Tensor
    masks: Tensor
    predicted: dict[str, Tensor]


def find_mask(image: str | Path) -> Path | None:
    """The mask of an image, or None.

    The mask of <root>/<path>.jpg is <root>/masks/<path>.png: <root>/masks/val/1.png for <root>/val/1.jpg, and
    <root>/masks/val/cat/1.png for <root>/val/cat/1.jpg.
    """
    image = Path(image)
    for root in _mask_roots(image):
        mask = (root / "masks" / image.relative_to(root)).with_suffix(".png")
        if mask.is_file():
            return mask
    return None


def find_masked(source: ImageSource) -> Subset:
    """Images of a source that have a mask: all of them, or NUM_SEGMENTED, evenly spaced."""
    has_masks: dict[str, bool] = {}  # by the folder of an image, of which there are far fewer
    masked = []
    for image in range(len(source)):
        name = source.name(image)
        folder = os.path.dirname(name)
        if folder not in has_masks:
            has_masks[folder] = any((root / "masks").is_dir() for root in _mask_roots(Path(name)))
        if has_masks[folder] and find_mask(name) is not None:
            masked.append(image)
    return subsample(Subset(source, np.array(masked, np.int64)), NUM_SEGMENTED)


def _mask_roots(image: Path) -> Sequence[Path]:
    """Folders that may hold the folder of the masks."""
    return image.parents[1 : 1 + MAX_DEPTH]


def read_masks(images: Sequence[str], image_size: tuple[int, int]) -> Tensor:
    """The masks of images that have one, cropped as the evaluation crops these: uint8 [n,H,W].

    Raises:
        EvaluationError: a mask does not have the shape of its image, or cannot be used.
    """
    masks = []
    for image in images:
        path = find_mask(image)
        assert path is not None, "images without a mask are left out before"
        _check_shape(Path(image), path)
        masks.append(read_mask(path, image_size))
    return torch.stack(masks)


def _check_shape(image: Path, mask: Path) -> None:
    """Refuse a mask of another shape than its image: cropped at the centre, it would show other places."""
    try:
        width, height = read_upright_size(image.read_bytes())
    except OSError:  # an array of NumPy, whose sides are not known to PIL
        return
    with Image.open(mask) as opened:
        mask_width, mask_height = opened.size
    # A mask of another size has sides that are rounded.
    if abs(width * mask_height - height * mask_width) > width + height:
        raise EvaluationError(
            f"the mask {mask} has {mask_width}x{mask_height} pixels, and {image} has {width}x{height} when it is "
            "upright (EXIF orientation): save the mask in the shape of the upright image"
        )


def read_mask(path: Path, image_size: tuple[int, int]) -> Tensor:
    """A mask, cropped as the evaluation crops its image: uint8 [H,W], 0 background, then the classes; 255 is void.

    Raises:
        EvaluationError: the file holds colours, or numbers above 255.
    """
    with Image.open(path) as image:
        if image.mode in ("I", "I;16"):
            values = np.asarray(image)
            if values.max() > 255 or values.min() < 0:
                raise EvaluationError(f"the mask {path} holds {values.max()}; class numbers go up to 254")
        elif image.mode in ("1", "L", "P"):
            values = np.asarray(image)  # class numbers; the colours of a palette do not matter
        else:
            raise EvaluationError(
                f"the mask {path} holds colours ({image.mode}), not class numbers; save it as an 8-bit grey or palette "
                f"PNG whose values are the classes"
            )
        if image.format == "PNG" and image.mode == "L":
            values = values // (255 // (2 ** _bit_depth(path) - 1))  # Pillow scales 2 and 4 bits to 0...255
        # Pillow resizes palette images to the nearest pixel, so no class is mixed of two others.
        indexed = Image.fromarray(values.astype(np.uint8)).convert("P")
    return torch.from_numpy(crop_center(indexed, image_size)[..., 0])


def label_patches(masks: Tensor, grid_size: tuple[int, int], num_classes: int) -> Tensor:
    """The most frequent class of each patch, without void pixels.

    Args:
        masks: integers [n,H,W], below num_classes or VOID.
        grid_size: rows and columns of patches, N in all.

    Returns:
        int64 [n,N]; VOID for patches of void pixels only. A tie goes to the lower class.
    """
    height, width = masks.shape[1:]
    rows, columns = grid_size
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    patch = row[:, None] * columns + column
    labels = torch.empty(len(masks), rows * columns, dtype=torch.int64)
    for i, mask in enumerate(masks):
        known = mask != VOID
        place = patch[known] * num_classes + mask[known].long()
        count = torch.bincount(place, minlength=rows * columns * num_classes).view(-1, num_classes)
        labels[i] = torch.where(count.sum(1) > 0, count.argmax(1), VOID)
    return labels


def segment(
    train_patches: Tensor,
    train_masks: Tensor,
    patches: Tensor,
    masks: Tensor,
    grid_size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
) -> Segmentation:
    """Fit a linear probe to training patches, and compare its predictions with masks, pixel by pixel.

    Args:
        train_patches: float [n,N,D]. train_masks: integers [n,H,W].
        patches: float [m,N,D]. masks: integers [m,H,W].
        grid_size: rows and columns of patches, N in all.

    Raises:
        EvaluationError: the masks of a split hold void only, or those of both splits one class, or there are fewer than
            10 training patches.
    """
    num_classes = 1 + max(_largest_class(train_masks), _largest_class(masks))
    if num_classes == 1:
        raise EvaluationError("the masks hold no class but 0, the background (255 is void)")
    features = train_patches.flatten(0, 1)
    labels = label_patches(train_masks, grid_size, num_classes).flatten()
    features, labels = features[labels != VOID], labels[labels != VOID]
    if len(features) < MIN_ROWS:
        raise EvaluationError(f"there are {len(features)} training patches; at least {MIN_ROWS} are needed")
    if len(features) > MAX_PATCHES:
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_PATCHES]
        features, labels = features[chosen], labels[chosen]
    probe = fit_linear(features, labels, device=device)
    predicted = probe.predict(patches.flatten(0, 1)).cpu().view(len(patches), *grid_size)
    counts = torch.stack(
        [count_pixels(image[None], mask[None], num_classes) for image, mask in zip(predicted, masks, strict=True)]
    )
    count = counts.sum(0)
    either_object, both_object = int(count.sum() - count[0, 0]), int(count[1:, 1:].sum())
    object_iou = both_object / either_object if either_object else 0.0
    scores = SegmentationScores(float(mean_iou(count[None])), object_iou, bootstrap_error(counts))
    return Segmentation(scores, predicted)


def count_pixels(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class (first index) that were predicted as each class (second index), without void pixels.

    Args:
        predicted: int64 [m,rows,columns], the class of each patch. masks: integers [m,H,W].

    Returns:
        int64 [num_classes,num_classes].
    """
    count = torch.zeros(num_classes**2, dtype=torch.int64)
    for labels, mask in zip(predicted, masks, strict=True):
        pixels = F.interpolate(labels[None, None].float(), size=mask.shape, mode="nearest")[0, 0].long()
        known = mask != VOID
        count += torch.bincount(mask[known].long() * num_classes + pixels[known], minlength=num_classes**2)
    return count.view(num_classes, num_classes)


def mean_iou(counts: Tensor) -> Tensor:
    """The mean over those classes that are in the masks or predicted: [...,L,L] of `count_pixels` -> float64 [...]."""
    counts = counts.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    either = counts.sum(-1) + counts.sum(-2) - both
    return (both / either.clamp_min(1)).sum(-1) / (either > 0).sum(-1).clamp_min(1)


def bootstrap_error(counts: Tensor) -> float:
    """Standard error of the mean IoU: its deviation over 200 draws of m of the m images, with a fixed seed.

    Args:
        counts: [m,L,L], `count_pixels` of each image.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(counts), (NUM_RESAMPLES, len(counts)), generator=generator)
    weight = torch.zeros(NUM_RESAMPLES, len(counts), dtype=torch.float64)
    weight.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))
    resampled = (weight @ counts.double().flatten(1)).unflatten(1, counts.shape[1:])
    return mean_iou(resampled).std().item()


def _largest_class(masks: Tensor) -> int:
    known = masks[masks != VOID]
    if not len(known):
        raise EvaluationError("the masks of a split hold void (255) only")
    return int(known.max())


def _bit_depth(path: Path) -> int:
    """Bits per sample of a PNG file, from its header."""
    with path.open("rb") as file:
        return file.read(25)[24]
