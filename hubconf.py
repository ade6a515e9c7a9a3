"""Encoders for `torch.hub.load`, with weights from your own run or file.

`dmtjepa_encoder` builds what the weights hold, `dmtjepa` an architecture with any patch size, and the others those of
the official runs.

encoder = torch.hub.load("PATH/OF/THIS/REPOSITORY", "dmtjepa_vitb16", weights="RUN/jepa-latest.pth.tar", source="local")
features = encoder(images).mean(1)  # images: [B, 3, 224, 224] uint8, or float normalised
"""

from __future__ import annotations

from pathlib import Path

from dmtjepa.interop import build_encoder, describe_encoder, find_normalization, get_part, load_weights, read_checkpoint
from dmtjepa.interop.sources import find_image_size, find_source
from dmtjepa.models import ARCHITECTURES, VisionTransformer

dependencies = ["torch", "torchvision", "pydantic", "yaml", "safetensors"]


def _build(model_name: str, patch_size: int, image_size: int, weights: str | None, part: str) -> VisionTransformer:
    if weights is None:
        return VisionTransformer(image_size, patch_size, **ARCHITECTURES[model_name]).eval()
    path = find_source(Path(weights))
    checkpoint = read_checkpoint(path)
    own = get_part(checkpoint, part, path)
    num_channels = describe_encoder(own).num_channels
    mean, std = find_normalization(checkpoint)
    encoder = VisionTransformer(
        image_size, patch_size, **ARCHITECTURES[model_name], num_channels=num_channels, mean=mean, std=std
    )
    load_weights(encoder, own, path)
    return encoder.eval()


def dmtjepa_encoder(
    weights: str, image_size: int | tuple[int, int] | None = None, part: str = "target_encoder"
) -> VisionTransformer:
    """The encoder that weights hold, of any architecture and patch size.

    Args:
        weights: a run folder (its latest weights), a `checkpoints/step-N` folder, a `.pth.tar` file of this project or
            of the official I-JEPA or DMT-JEPA code, a `model.safetensors` file or folder of Hugging Face or timm, or
            the name of a repository of Hugging Face, such as `facebook/ijepa_vith14_1k`.
        image_size: height and width in pixels, or the side of a square. None takes the size of the training.
        part: which encoder to load, `target_encoder` (teacher) or `encoder` (student).

    Returns:
        The encoder in evaluation mode on the CPU.
    """
    path = find_source(Path(weights))
    checkpoint = read_checkpoint(path)
    normalization = find_normalization(checkpoint)
    size = find_image_size(Path(weights)) if image_size is None else image_size
    return build_encoder(get_part(checkpoint, part, path), path, image_size=size, normalization=normalization)


def dmtjepa(
    model_name: str = "vit_base",
    patch_size: int = 16,
    image_size: int = 224,
    weights: str | None = None,
    part: str = "target_encoder",
) -> VisionTransformer:
    """An encoder by its architecture and patch size.

    Args:
        model_name: as the setting `meta.model_name`: `vit_nano`, `vit_tiny`, `vit_small`, `vit_base`, `vit_large`,
            `vit_huge` or `vit_giant`.
        patch_size: side of a patch in pixels, such as 4, 8, 14 or 16. It divides `image_size`.
        image_size, weights, part: as of `dmtjepa_vitt16`.

    Returns:
        The encoder in evaluation mode on the CPU.

    Raises:
        ValueError: there is no such architecture, or the weights are of another one.
    """
    if model_name not in ARCHITECTURES:
        raise ValueError(f"model_name {model_name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return _build(model_name, patch_size, image_size, weights, part)


def dmtjepa_vitt16(
    weights: str | None = None, image_size: int = 224, part: str = "target_encoder"
) -> VisionTransformer:
    """ViT-Ti/16.

    Args:
        weights: as of `dmtjepa_encoder`. None keeps random weights.
        image_size: side of the images in pixels for which the position embedding is made.
        part: which encoder to load, `target_encoder` (teacher) or `encoder` (student).

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
