"""Weights in and out: the released `.pth.tar` layout, timm, Hugging Face."""

from dmtjepa.interop.checkpoint import (
    WeightsError,
    build_encoder,
    describe_encoder,
    load_model,
    load_weights,
    read_checkpoint,
)
from dmtjepa.interop.export import export_huggingface, export_released, export_timm

__all__ = [
    "WeightsError",
    "build_encoder",
    "describe_encoder",
    "export_huggingface",
    "export_released",
    "export_timm",
    "load_model",
    "load_weights",
    "read_checkpoint",
]
