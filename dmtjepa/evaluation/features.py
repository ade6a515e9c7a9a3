"""Features of a frozen encoder over a set of images: what k-NN, probes and collapse numbers are computed from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

PIXEL_SIDE = 32
"""Raw-pixel baselines average an image to at most this many pixels a side (CIFAR-10's own size)."""

Batch = tuple[Tensor, Tensor | None, list[str]]
"""images uint8 [B,3,H,W], labels int64 [B] or None, paths."""


LAYOUT_SIDE = 4
"""Features that keep the layout of an image are averages over at most this many fields of the grid a side."""


@dataclass(frozen=True)
class Features:
    """Features of n images: pooled float32 [n,D] on the CPU; labels int64 [n], or None where there are none.

    layout: float32 [n,S*S*D], averages over S x S fields of the grid one after the other, if they were asked for.
    """

    pooled: Tensor
    labels: Tensor | None
    layout: Tensor | None = None


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    num_layers: int = 1,
    grid_size: tuple[int, int] | None = None,
    description: str = "features",
    progress: bool = True,
) -> Features:
    """Average-pooled outputs of a frozen encoder for every image of `batches`.

    I-JEPA evaluates the average of the teacher's patch outputs (section 5); its linear probe may also concatenate
    the averages of the last four layers. bfloat16 on CUDA, float32 on the CPU; the average is taken in float32.

    Args:
        encoder: maps images uint8 [B,3,H,W] to [B,N,D]; with num_layers > 1 it has `blocks` and a final `norm`.
        batches: images uint8 [B,3,H,W], labels int64 [B] or None, paths.
        num_layers: concatenate the averages of this many last blocks, each through the final norm: D * num_layers.
        grid_size: rows and columns of patches, to have `layout` too, of the last block.
        progress: show a bar, where standard error is a terminal.

    Raises:
        ValueError: no image came, or num_layers is out of range.
    """
    encoder = encoder.to(device).eval()
    pooled: list[Tensor] = []
    layout: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels, _ in tqdm(batches, desc=description, unit="batch", disable=None if progress else True):
        with _autocast(device):
            layers = last_layers(encoder, images.to(device, non_blocking=True), num_layers)
        pooled.append(torch.cat([layer.float().mean(1) for layer in layers], dim=1).cpu())
        if grid_size is not None:
            fields = layers[-1].float().transpose(1, 2).unflatten(2, grid_size)
            side = [min(LAYOUT_SIDE, length) for length in grid_size]
            layout.append(F.adaptive_avg_pool2d(fields, side).flatten(2).transpose(1, 2).flatten(1).cpu())
        if batch_labels is not None:
            labels.append(batch_labels.cpu())
    if not pooled:
        raise ValueError(f"{description}: no images to evaluate; check the folder given as data")
    return Features(torch.cat(pooled), torch.cat(labels) if labels else None, torch.cat(layout) if layout else None)


@torch.no_grad()
def extract_patches(encoder: nn.Module, images: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Patch outputs of a frozen encoder: images uint8 [B,3,H,W] -> float32 [B,N,D] on the CPU."""
    encoder = encoder.to(device).eval()
    with _autocast(device):
        return encoder(images.to(device)).float().cpu()


def extract_pixels(batches: Iterable[Batch]) -> Features:
    """Raw pixels as features: averaged to at most 32x32, less the mean of the image, flattened.

    Taking the mean away makes cosine similarity compare patterns; without it, brightness alone decides.
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
        raise ValueError("pixels: no images to evaluate; check the folder given as data")
    return Features(torch.cat(pooled).cpu(), torch.cat(labels) if labels else None)


def last_layers(encoder: nn.Module, images: Tensor, num_layers: int) -> list[Tensor]:
    """Outputs [B,N,D] of the last `num_layers` blocks, each through the encoder's final norm, the last one last."""
    if num_layers == 1:
        return [encoder(images)]
    if not 1 <= num_layers <= len(encoder.blocks):
        raise ValueError(
            f"num_layers: {num_layers} is not between 1 and the {len(encoder.blocks)} blocks of the encoder"
        )
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in encoder.blocks[-num_layers:]
    ]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [encoder.norm(output) for output in outputs]


def _autocast(device: torch.device | str) -> torch.autocast:
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")
