"""A folder of `config.json` and `model.safetensors`, as timm and Hugging Face store an encoder; or that file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dmtjepa.files import write_atomically, write_json
from dmtjepa.interop.errors import WeightsError
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


def describe_preprocessing(encoder: VisionTransformer) -> dict[str, Any]:
    """How pixels become the input of the encoder, for formats that have no description of their own."""
    return {
        "resize_shorter_side": resized_side(encoder),
        "interpolation": "bilinear, antialiased",
        "center_crop": list(image_size(encoder)),
        "divide_by": 255,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "layout": f"{describe_channels(encoder.num_channels)}, [batch, channel, row, column]",
    }


def describe_channels(num_channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(num_channels, f"{num_channels} channels")


def hidden_dim(encoder: VisionTransformer) -> int:
    return encoder.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]


def write_model_folder(
    folder: Path, weights: Mapping[str, Tensor], descriptions: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write `model.safetensors`, then the JSON files of `descriptions`, by name. Each file is replaced whole.

    Raises:
        WeightsError: a weight is not finite; nothing was written.
    """
    _write_weights(folder / "model.safetensors", weights, {"format": "pt"})
    for name, description in descriptions.items():
        write_json(folder / name, description)


def export_safetensors(encoder: VisionTransformer, path: Path) -> None:
    """Write `path`, the weights under this project's names, which are timm's, with the preprocessing in the metadata.

    Raises:
        WeightsError: the name does not end with `.safetensors`, or a weight is not finite; nothing was written.
    """
    check_suffix(path, ".safetensors")
    metadata = {"format": "pt", "preprocessing": json.dumps(describe_preprocessing(encoder))}
    _write_weights(path, encoder.state_dict(), metadata)


def check_suffix(path: Path, suffix: str) -> None:
    """Refuse the name of a file that other programs would not recognise. Raises WeightsError."""
    if path.suffix != suffix:
        raise WeightsError(f"{path}: a file of this format has a name that ends with {suffix}")


def _write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    check_finite(weights, "the encoder")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in weights.items()}
    write_atomically(path, save(tensors, metadata=metadata))
