"""A folder of `config.json` and `model.safetensors`: how timm and Hugging Face store an encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dmtjepa.models import VisionTransformer


def image_size(encoder: VisionTransformer) -> tuple[int, int]:
    rows, columns = encoder.grid_size
    return rows * encoder.patch_size, columns * encoder.patch_size


def hidden_dim(encoder: VisionTransformer) -> int:
    return encoder.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]


def write_model_folder(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
