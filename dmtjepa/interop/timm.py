"""Writing an encoder for timm."""

from __future__ import annotations

from pathlib import Path

from dmtjepa.interop.model_folder import hidden_dim, image_size, resized_side, write_model_folder
from dmtjepa.models import VisionTransformer


def export_timm(encoder: VisionTransformer, folder: Path) -> None:
    """Write config.json and model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Parameter names are timm's own. The model is a `vit_*_gap_*`: no class token, average pooling after the norm, no
    classifier, as timm's `vit_huge_patch14_gap_224.in1k_ijepa`.
    """
    height, width = image_size(encoder)
    config = {
        "architecture": "vit_base_patch16_224",  # which the arguments below make into any size
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": [height, width],
            "patch_size": encoder.patch_size,
            "in_chans": encoder.num_channels,
            "embed_dim": encoder.embed_dim,
            "depth": len(encoder.blocks),
            "num_heads": encoder.num_heads,
            "mlp_ratio": hidden_dim(encoder) / encoder.embed_dim,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [encoder.num_channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": crop_share(encoder),
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_model_folder(folder, encoder.state_dict(), {"config.json": config})


def crop_share(encoder: VisionTransformer) -> float:
    """The central crop's share of the resized image.

    timm resizes to the crop over this share, rounded down: the small margin makes that `resized_side` exactly.
    """
    return max(image_size(encoder)) / (resized_side(encoder) + 1e-4)
