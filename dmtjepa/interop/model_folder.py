"""A folder of `config.json` and `model.safetensors`: how timm and Hugging Face store an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dmtjepa.files import write_atomically, write_json
from dmtjepa.interop.weights import check_finite
from dmtjepa.models import VisionTransformer

RESIZED_SHARE = 256 / 224
"""Shorter side of the resized image over that of the central crop, as in this project's evaluation."""


def image_size(encoder: VisionTransformer) -> tuple[int, int]:
    rows, columns = encoder.grid_size
    return rows * encoder.patch_size, columns * encoder.patch_size


def resized_side(encoder: VisionTransformer) -> int:
    """To how many pixels the shorter side of an image is resized before the central crop."""
    return round(max(image_size(encoder)) * RESIZED_SHARE)


def hidden_dim(encoder: VisionTransformer) -> int:
    return encoder.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]


def write_model_folder(
    folder: Path, weights: Mapping[str, Tensor], descriptions: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write `model.safetensors`, then the JSON files of `descriptions`, by name. Each file is replaced whole.

    Raises:
        WeightsError: a weight is not finite; nothing was written.
    """
    check_finite(weights, "the encoder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in weights.items()}
    write_atomically(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    for name, description in descriptions.items():
        write_json(folder / name, description)
