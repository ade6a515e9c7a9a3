"""Writing an encoder for timm or Hugging Face transformers, and a whole checkpoint in the released layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmtjepa.interop.checkpoint import WeightsError
from dmtjepa.models import VisionTransformer
from dmtjepa.models.layers import LAYER_NORM_EPS
from dmtjepa.models.vit import IMAGENET_MEAN, IMAGENET_STD

CROP_SHARE = 224 / 256
"""Side of the central crop over the shorter side of the resized image, as in this project's evaluation."""
RELEASED_PARTS = ("encoder", "predictor", "target_encoder", "head", "target_head")
RELEASED_NUMBERS = ("epoch", "loss", "batch_size", "world_size", "lr")


def export_timm(encoder: VisionTransformer, folder: Path) -> None:
    """Write config.json and model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Parameter names are timm's own. The model is a `vit_*_gap_*`: no class token, average pooling after the norm, no
    classifier, as timm's `vit_huge_patch14_gap_224.in1k_ijepa`.
    """
    height, width = _image_size(encoder)
    config = {
        "architecture": "vit_base_patch16_224",  # which the arguments below make into any size
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": [height, width],
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.embed_dim,
            "depth": len(encoder.blocks),
            "num_heads": encoder.num_heads,
            "mlp_ratio": _hidden_dim(encoder) / encoder.embed_dim,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write(folder, encoder.state_dict(), config)


def export_huggingface(encoder: VisionTransformer, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors for `IJepaModel.from_pretrained(FOLDER)`.

    Names are those of the published `facebook/ijepa_*` files, which transformers reads from 4.47 on.
    """
    height, width = _image_size(encoder)
    square = height == width
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": _hidden_dim(encoder),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if square else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    _write(folder, huggingface_weights(encoder.state_dict()), config)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def huggingface_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's state dictionary under the names of the published Hugging Face files; qkv split in three."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            renamed[HUGGINGFACE_NAMES[name]] = value
            continue
        layer, kind = f"encoder.layer.{parts[1]}", parts[-1]
        inner = ".".join(parts[2:-1])
        if inner == "attn.qkv":
            for target, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{target}.{kind}"] = third
        else:
            renamed[f"{layer}.{HUGGINGFACE_LAYER_NAMES[inner]}.{kind}"] = value
    return renamed


HUGGINGFACE_NAMES = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
HUGGINGFACE_LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def export_released(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint in the layout of the released I-JEPA and DMT-JEPA files, for code that reads those.

    All parts of the model, every name prefixed with `module.` (timm, for one, takes only such names), and the numbers
    beside them; no optimizer state. The heads, which released files lack, are kept: readers that do not know them
    do not look.

    Raises:
        WeightsError: the checkpoint has no encoder.
    """
    parts = [name for name in RELEASED_PARTS if name in checkpoint]
    if "encoder" not in parts:
        raise WeightsError(f"the checkpoint has no encoder; it has {', '.join(map(str, checkpoint))}")
    released: dict[str, Any] = {
        part: {f"module.{name}": value.clone() for name, value in checkpoint[part].items()} for part in parts
    }
    released |= {name: checkpoint[name] for name in RELEASED_NUMBERS if name in checkpoint}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(released, path)


def _image_size(encoder: VisionTransformer) -> tuple[int, int]:
    rows, columns = encoder.grid_size
    return rows * encoder.patch_size, columns * encoder.patch_size


def _hidden_dim(encoder: VisionTransformer) -> int:
    return encoder.blocks[0].mlp.fc1.out_features


def _write(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
