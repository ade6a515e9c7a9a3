"""The names of an encoder's weights in the `facebook/ijepa_*` files of Hugging Face, to and from this project's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dmtjepa.interop.errors import WeightsError

NAMES = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's state dictionary under the names of the `facebook/ijepa_*` files; qkv split in three."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            renamed[NAMES[name]] = value
            continue
        layer, kind = f"encoder.layer.{parts[1]}", parts[-1]
        inner = ".".join(parts[2:-1])
        if inner == "attn.qkv":
            for target, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{target}.{kind}"] = third
        else:
            renamed[f"{layer}.{LAYER_NAMES[inner]}.{kind}"] = value
    return renamed


def is_huggingface(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an `IJepaModel`, by their names."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in weights)


def from_huggingface(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of an `IJepaModel` under this project's names; a classifier or pooler is left out.

    Raises:
        WeightsError: there are weights that an encoder of I-JEPA does not have, e.g. a class token.
    """
    own = {name: mine for mine, name in NAMES.items()}
    inner = {name: mine for mine, name in LAYER_NAMES.items()}
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for full, value in weights.items():
        name = full.removeprefix("ijepa.")
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in own:
            found[own[name]] = value
        elif layer and layer[2].removeprefix("attention.attention.") in _QKV:
            qkv = thirds.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})
            qkv[layer[2].removeprefix("attention.attention.")] = value
        elif layer and layer[2] in inner:
            found[f"blocks.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = value
        elif not name.startswith(("classifier.", "pooler.")):
            raise WeightsError(f"{source} holds {full}, which no encoder of I-JEPA has")
    for name, parts in thirds.items():
        if parts.keys() != set(_QKV):
            raise WeightsError(f"{source} lacks a part of {name}: it has {', '.join(parts)}")
        found[name] = torch.cat([parts[part] for part in _QKV])
    return found
