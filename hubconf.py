"""Encoders for `torch.hub.load`: the architectures of the official runs, with weights from your own file.

encoder = torch.hub.load("PATH/OF/THIS/REPOSITORY", "dmtjepa_vitb16", weights="RUN/jepa-latest.pth.tar", source="local")
features = encoder(images).mean(1)  # images: [B, 3, 224, 224] uint8, or float normalised
"""

from __future__ import annotations

from dmtjepa.interop import build_encoder, describe_encoder, find_normalization, get_part, load_weights, read_checkpoint
from dmtjepa.models import ARCHITECTURES, VisionTransformer

dependencies = ["torch", "torchvision", "pydantic", "yaml", "safetensors"]


def _build(model_name: str, patch_size: int, image_size: int, weights: str | None, part: str) -> VisionTransformer:
    if weights is None:
        return VisionTransformer(image_size, patch_size, **ARCHITECTURES[model_name]).eval()
    checkpoint = read_checkpoint(weights)
    own = get_part(checkpoint, part, weights)
    num_channels = describe_encoder(own).num_channels
    mean, std = find_normalization(checkpoint)
    encoder = VisionTransformer(
        image_size, patch_size, **ARCHITECTURES[model_name], num_channels=num_channels, mean=mean, std=std
    )
    load_weights(encoder, own, weights)
    return encoder.eval()


def dmtjepa_encoder(
    weights: str, image_size: int | tuple[int, int] | None = None, part: str = "target_encoder"
) -> VisionTransformer:
    """The encoder that a file holds, of any architecture and patch size.

    Args:
        weights: a `.pth.tar` file.
        image_size: height and width in pixels, or the side of a square. None takes the size of the file.
        part: which encoder of the file to load, `target_encoder` (teacher) or `encoder` (student).

    Returns:
        The encoder in evaluation mode on the CPU.
    """
    checkpoint = read_checkpoint(weights)
    normalization = find_normalization(checkpoint)
    return build_encoder(
        get_part(checkpoint, part, weights), weights, image_size=image_size, normalization=normalization
    )


def dmtjepa_vitt16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-Ti/16.

    Args:
        weights: a `.pth.tar` file. None keeps random weights.
        image_size: side of the images in pixels for which the position embedding is made.
        part: which encoder of the file to load, `target_encoder` (teacher) or `encoder` (student).

    Returns:
        The encoder in evaluation mode on the CPU.
    """
    return _build("vit_tiny", 16, image_size, weights, part)


def dmtjepa_vits16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-S/16; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_small", 16, image_size, weights, part)


def dmtjepa_vitb16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-B/16; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_base", 16, image_size, weights, part)


def dmtjepa_vitl16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-L/16; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_large", 16, image_size, weights, part)


def dmtjepa_vith14(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-H/14; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_huge", 14, image_size, weights, part)


def dmtjepa_vith16_448(
    weights: str | None = None, image_size: int = 448, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-H/16 at 448 pixels; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_huge", 16, image_size, weights, part)


def dmtjepa_vitg16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-g/16; see `dmtjepa_vitt16` for the arguments."""
    return _build("vit_giant", 16, image_size, weights, part)
