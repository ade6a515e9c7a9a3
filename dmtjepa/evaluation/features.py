"""Features of a frozen encoder for a set of images: the input of k-NN, linear probes and collapse numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.models import VisionTransformer

PIXEL_SIDE = 32
"""The raw-pixel baseline averages an image to at most this many pixels per side (the size of CIFAR-10)."""

Batch = tuple[Tensor, Tensor | None, list[str]]
"""images uint8 [B,3,H,W], labels int64 [B] or None, names."""

LAYOUT_SIDE = 4
"""Features that keep the layout of an image are averages over at most this many fields of the grid per side."""


@dataclass(frozen=True)
class Features:
    """Features of n images on the CPU.

    pooled: float32 [n,D]. labels: int64 [n], or None if the images have none.
    layout: float32 [n,S*S*D], concatenated averages over S x S fields of the grid, or None.
    blocks: float32 [n,D*L], concatenated averages over patches of the last L blocks, or None.
    """

    pooled: Tensor
    labels: Tensor | None
    layout: Tensor | None = None
    blocks: Tensor | None = None


@torch.no_grad()
def extract_features(
    encoder: VisionTransformer,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    num_layers: int = 1,
    grid_size: tuple[int, int] | None = None,
    description: str = "features",
    progress: bool = True,
) -> Features:
    """Average-pooled outputs of a frozen encoder for all images of `batches`.

    I-JEPA (arXiv 2301.08243, section 5) evaluates the average of the teacher's patch outputs. Its linear probe may
    also concatenate the averages of the last four layers. The encoder computes in bfloat16 on CUDA and in float32 on
    the CPU; averages are computed in float32.

    Args:
        encoder: maps images uint8 [B,3,H,W] to [B,N,D].
        batches: images uint8 [B,3,H,W], labels int64 [B] or None, names.
        num_layers: concatenate the averages of the last `num_layers` blocks, each after the final norm: the pooled
            features are then [n,D*num_layers].
        grid_size: rows and columns of patches; if given, `layout` is computed from the last block.
        description: what the features are, for the progress bar and for errors.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        EvaluationError: there is no readable image.
        ValueError: num_layers is out of range.
    """
    encoder = encoder.to(device).eval()
    pooled: list[Tensor] = []
    layout: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels, _ in tqdm(batches, desc=description, unit="batch", disable=None if progress else True):
        with autocast(device):
            layers = last_layers(encoder, images.to(device, non_blocking=True), num_layers)
        pooled.append(torch.cat([average_patches(layer) for layer in layers], dim=1).cpu())
        if grid_size is not None:
            layout.append(average_fields(layers[-1], grid_size).cpu())
        if batch_labels is not None:
            labels.append(batch_labels.cpu())
    if not pooled:
        raise EvaluationError(f"{description}: no images could be read; check the images that are evaluated")
    return Features(torch.cat(pooled), torch.cat(labels) if labels else None, torch.cat(layout) if layout else None)


@torch.no_grad()
def extract_patches(encoder: nn.Module, images: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Patch outputs of a frozen encoder: images uint8 [B,3,H,W] -> float32 [B,N,D] on the CPU."""
    encoder = encoder.to(device).eval()
    with autocast(device):
        return encoder(images.to(device)).float().cpu()


def average_patches(patches: Tensor) -> Tensor:
    """The average over patches in float32: [B,N,D] -> [B,D]."""
    return patches.float().mean(1)


def average_fields(patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Averages over S x S fields of the grid in float32, concatenated: [B,N,D] -> [B,S*S*D], see `LAYOUT_SIDE`."""
    fields = patches.float().transpose(1, 2).unflatten(2, grid_size)
    side = (min(LAYOUT_SIDE, grid_size[0]), min(LAYOUT_SIDE, grid_size[1]))
    return F.adaptive_avg_pool2d(fields, side).flatten(2).transpose(1, 2).flatten(1)


def extract_pixels(batches: Iterable[Batch]) -> Features:
    """Raw pixels as features: averaged to at most 32x32, minus the mean of the image, flattened.

    With the mean subtracted, cosine similarity compares patterns; otherwise it would compare brightness.

    Raises:
        EvaluationError: there is no readable image.
    """
    pooled: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels, _ in batches:
        size = [min(PIXEL_SIDE, side) for side in images.shape[-2:]]
        pixels = F.interpolate(images.float() / 255, size=size, mode="area").flatten(1)
        pooled.append(pixels - pixels.mean(1, keepdim=True))
        if batch_labels is not None:
            labels.append(batch_labels.cpu())
    if not pooled:
        raise EvaluationError("pixels: no images could be read; check the images that are evaluated")
    return Features(torch.cat(pooled).cpu(), torch.cat(labels) if labels else None)


def last_layers(encoder: VisionTransformer, images: Tensor, num_layers: int) -> list[Tensor]:
    """Outputs [B,N,D] of the last `num_layers` blocks, each after the final norm of the encoder; the last block last.

    Raises:
        ValueError: the encoder has fewer blocks.
    """
    if num_layers == 1:
        return [encoder(images)]
    if not 1 <= num_layers <= len(encoder.blocks):
        raise ValueError(
            f"num_layers: {num_layers} is not between 1 and the {len(encoder.blocks)} blocks of the encoder"
        )
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in list(encoder.blocks)[-num_layers:]
    ]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [encoder.norm(output) for output in outputs]


def autocast(device: torch.device | str) -> torch.autocast:
    """What a frozen encoder computes in: bfloat16 on CUDA, float32 on a CPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
