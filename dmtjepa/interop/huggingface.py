"""Writing an encoder for Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dmtjepa.interop.model_folder import hidden_dim, image_size, resized_side, write_model_folder
from dmtjepa.models import VisionTransformer
from dmtjepa.models.layers import LAYER_NORM_EPS
from dmtjepa.models.vit import IMAGENET_MEAN, IMAGENET_STD

PIL_BILINEAR = 2


def export_huggingface(encoder: VisionTransformer, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors for `IJepaModel.from_pretrained(FOLDER)`.

    The preprocessor resizes the shorter side and takes the central crop, as this project's evaluation. Names are those
    of the `facebook/ijepa_*` files, which transformers reads from 4.47 on.
    """
    height, width = image_size(encoder)
    square = height == width
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": hidden_dim(encoder),
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
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resized_side(encoder)},
        "resample": PIL_BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    descriptions = {"preprocessor_config.json": preprocessor, "config.json": config}
    write_model_folder(folder, huggingface_weights(encoder.state_dict()), descriptions)


def huggingface_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's state dictionary under the names of the `facebook/ijepa_*` files; qkv split in three."""
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
