"""Writing an encoder for Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path

from dmtjepa.interop.huggingface_names import to_huggingface
from dmtjepa.interop.model_folder import hidden_dim, image_size, resized_side, write_model_folder
from dmtjepa.models import VisionTransformer
from dmtjepa.models.layers import LAYER_NORM_EPS

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
        "num_channels": encoder.num_channels,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": encoder.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized_side(encoder)},
        "resample": PIL_BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    descriptions = {"preprocessor_config.json": preprocessor, "config.json": config}
    write_model_folder(folder, to_huggingface(encoder.state_dict()), descriptions)
