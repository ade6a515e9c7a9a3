"""A trained encoder for one's own images: `dmtjepa.load("runs/mine")`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dmtjepa.config import expand_path
from dmtjepa.data.crop import crop_center
from dmtjepa.data.decode import convert_channels
from dmtjepa.devices import check_device
from dmtjepa.interop import build_encoder, find_max_value, find_normalization, get_part, read_checkpoint
from dmtjepa.interop.sources import find_image_size, find_source
from dmtjepa.models import VisionTransformer


class EncodedImages(NamedTuple):
    """Features of B images in float32. patches: [B,N,D] in raster order. pooled: [B,D], their average."""

    patches: Tensor
    pooled: Tensor


class Encoder:
    """A frozen encoder with its preprocessing. Build it with `load`.

    Args:
        model: its weights; it is put into evaluation mode.
        max_value: what counts as 1 in images of more than 8 bits; None: see `data.max_value`.
    """

    def __init__(self, model: VisionTransformer, max_value: float | None = None) -> None:
        self.max_value = max_value
        self.model = model.eval().requires_grad_(False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        rows, columns = self.grid_size
        return rows * self.model.patch_size, columns * self.model.patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches: their product is N."""
        return self.model.grid_size

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.norm.weight.device

    def to(self, device: torch.device | str) -> Encoder:
        """Move it to a device; returns itself."""
        self.model.to(device)
        return self

    def preprocess(self, image: Image.Image) -> Tensor:
        """The central crop of an image of any size and mode, as the evaluation takes it: uint8 [C,H,W].

        Raises:
            CorruptImage: it has other than C channels, and C is neither 3 nor 1.
        """
        converted = convert_channels(image, self.model.num_channels, self.max_value)
        return torch.from_numpy(crop_center(converted, self.image_size)).permute(2, 0, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> EncodedImages:
        """Features of images uint8 [B,C,H,W], or float normalised by the mean and standard deviation of the model.

        Raises:
            ValueError: the images have another shape, or a size that is not a multiple of the patch size.
        """
        if images.ndim != 4 or images.shape[1] != self.model.num_channels:
            raise ValueError(f"images must be [B,{self.model.num_channels},H,W], got {list(images.shape)}")
        patches = self.model(images.to(self.device)).float()
        return EncodedImages(patches, patches.mean(1))


def load(
    source: str | os.PathLike[str],
    *,
    part: str = "target_encoder",
    image_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Load an encoder.

    Args:
        source: a run folder (its latest weights), a `checkpoints/step-N` folder, a `.pth.tar` file of this project or
            of the official I-JEPA or DMT-JEPA code, a folder of Hugging Face's `IJepaModel` or of timm, or the name of
            a repository of Hugging Face, such as `facebook/ijepa_vith14_1k`, which is downloaded once.
        part: `target_encoder`, the teacher, or `encoder`, the student. Weights of Hugging Face or timm hold one.
        image_size: height and width, or the side of a square. None takes that of the training. The position
            embedding is resampled to any other size.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: there are no such weights, they are not an encoder's, or there is no such device or image size; the
            message says what is there.
    """
    where = check_device(str(device))
    given = Path(expand_path(os.fspath(source), "source"))
    path = find_source(given)
    checkpoint = read_checkpoint(path)
    weights = get_part(checkpoint, part, path)
    size = find_image_size(given) if image_size is None else image_size
    encoder = build_encoder(weights, path, image_size=size, normalization=find_normalization(checkpoint))
    return Encoder(encoder, find_max_value(checkpoint)).to(where)
