"""Reading the encoder in a `model.safetensors` file of Hugging Face, timm or this project's exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmtjepa.interop.errors import WeightsError
from dmtjepa.interop.huggingface_names import from_huggingface, is_huggingface
from dmtjepa.models import ARCHITECTURES

FILE_NAME = "model.safetensors"


def is_encoder_file(path: Path) -> bool:
    """Whether a path names a file of an encoder alone, by its extension."""
    return path.suffix == ".safetensors"


def find_encoder_file(folder: Path) -> Path | None:
    """The file of weights in a folder of Hugging Face or timm, or None if it is no such folder.

    Raises:
        WeightsError: the weights are in several files or in another format.
    """
    if (folder / FILE_NAME).is_file():
        return folder / FILE_NAME
    others = [*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model*.bin")]
    if others:
        raise WeightsError(
            f"{folder} holds {others[0].name} and no {FILE_NAME}; save the model again in one file, with "
            "save_pretrained(FOLDER, max_shard_size='100GB', safe_serialization=True)"
        )
    return None


def read_encoder_file(path: Path) -> dict[str, Tensor]:
    """An encoder's weights in float32, under this project's names, which are timm's.

    Raises:
        WeightsError: there is no such file, it cannot be read, or it holds something else than an encoder of I-JEPA.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a file of safetensors: {error}") from error
    if is_huggingface(weights):
        weights = from_huggingface(weights, str(path))
    token = next((name for name in weights if name in ("cls_token", "reg_token", "dist_token")), None)
    if token is not None:
        raise WeightsError(f"{path} holds {token}: its model has a token beside the patches, which I-JEPA has not")
    weights = {name: value.float() for name, value in weights.items() if not name.startswith(("head.", "fc_norm."))}
    _check_heads(path, weights)
    return weights


def _check_heads(path: Path, weights: dict[str, Tensor]) -> None:
    """Shapes do not tell the number of attention heads: compare that of config.json with the architecture's."""
    try:
        config: dict[str, Any] = json.loads(path.with_name("config.json").read_text())
    except (OSError, ValueError):
        return
    given = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads")
    width = weights["norm.weight"].shape[0] if "norm.weight" in weights else None
    known = [size["num_heads"] for size in ARCHITECTURES.values() if size["embed_dim"] == width]
    if given is not None and known and given not in known:
        raise WeightsError(
            f"{path} is of a model of width {width} with {given} attention heads; here it has {known[0]}"
        )
