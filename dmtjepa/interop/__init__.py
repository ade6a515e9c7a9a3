"""Weights in and out: the official `.pth.tar` layout, timm, Hugging Face, safetensors, ONNX, `torch.export`."""

from dmtjepa.interop.huggingface import export_huggingface
from dmtjepa.interop.model_card import find_origin, format_card
from dmtjepa.interop.model_folder import export_safetensors
from dmtjepa.interop.normalization import find_max_value, find_normalization
from dmtjepa.interop.official import export_checkpoint, export_official, write_official
from dmtjepa.interop.programs import export_onnx, export_program
from dmtjepa.interop.timm import export_timm
from dmtjepa.interop.weights import (
    EncoderShape,
    WeightsError,
    build_encoder,
    check_finite,
    describe_encoder,
    get_part,
    load_model,
    load_weights,
    read_checkpoint,
)

__all__ = [
    "EncoderShape",
    "WeightsError",
    "build_encoder",
    "check_finite",
    "describe_encoder",
    "export_checkpoint",
    "export_huggingface",
    "export_official",
    "export_onnx",
    "export_program",
    "export_safetensors",
    "export_timm",
    "find_max_value",
    "find_normalization",
    "find_origin",
    "format_card",
    "get_part",
    "load_model",
    "load_weights",
    "read_checkpoint",
    "write_official",
]
