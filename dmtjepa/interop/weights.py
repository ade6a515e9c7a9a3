"""Reading weights from this project's and the official I-JEPA's and DMT-JEPA's `.pth.tar` files into models."""

from __future__ import annotations

import logging
import math
import numbers
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmtjepa.checkpoint_format import is_checkpoint, load_full, read_meta
from dmtjepa.interop.encoder_file import is_encoder_file, read_encoder_file
from dmtjepa.interop.errors import WeightsError
from dmtjepa.interop.normalization import Normalization, read_normalization
from dmtjepa.models import ARCHITECTURES, VisionTransformer
from dmtjepa.models.layers import resample_position_embedding
from dmtjepa.objective import DMTJEPA

logger = logging.getLogger(__name__)

MAX_LISTED = 8
POSITION_EMBEDDINGS = ("pos_embed", "predictor_pos_embed")
PROGRAMS = {".onnx": "ONNX", ".pt2": "torch.export"}
"""Extensions of exports whose weights are not read back."""
MODULES = {
    "encoder": "encoder",
    "predictor": "predictor",
    "target_encoder": "teacher_encoder",
    "head": "head",
    "target_head": "teacher_head",
}
"""Official name of each part of a checkpoint -> attribute of `DMTJEPA`."""


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder's weights say about it. num_patches is N of the position embedding, num_channels C of images."""

    model_name: str | None
    embed_dim: int
    depth: int
    hidden_dim: int
    patch_size: int
    num_patches: int
    num_channels: int = 3

    def __str__(self) -> str:
        side = round(self.num_patches**0.5)
        name = self.model_name or f"an encoder of width {self.embed_dim} and depth {self.depth}"
        size = (
            f"{side * self.patch_size}x{side * self.patch_size} pixels" if side**2 == self.num_patches else "not square"
        )
        channels = "" if self.num_channels == 3 else f", for images of {self.num_channels} channels"
        return f"{name} with patches of {self.patch_size} pixels and {self.num_patches} positions ({size}){channels}"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `.pth.tar` file, a checkpoint folder `step-{n}`, or a `model.safetensors` file on the CPU.

    Returns:
        State dictionaries by official name (see `MODULES`), without the prefix `module.`, and what else the file holds.
        Tensors of a `.pth.tar` file stay on disk until they are used. A `model.safetensors` file of Hugging Face or
        timm holds one encoder, which is both `encoder` and `target_encoder`.

    Raises:
        WeightsError: there is no such file, or it cannot be read as tensors alone. No code in a file is run.
        CheckpointError: the checkpoint folder cannot be read.
    """
    path = Path(path)
    if path.is_dir() and is_checkpoint(path):
        state, meta = load_full(path), read_meta(path)
        weights = {part: select_module(state, module) for part, module in MODULES.items()}
        return {part: values for part, values in weights.items() if values} | meta
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give a .pth.tar file or a checkpoints/step-N folder")
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.pth.tar"))
        hint = f"its folder holds {', '.join(others[-MAX_LISTED:])}" if others else "its folder holds no .pth.tar file"
        raise WeightsError(f"there is no checkpoint {path}; {hint}. A run writes its first one after its first epoch")
    if is_encoder_file(path):
        encoder = read_encoder_file(path)
        return {"encoder": encoder, "target_encoder": encoder} | read_normalization(path)
    try:
        # Files of PyTorch before 1.6 are not zip archives; they are read at once.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged file makes of its bytes
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint of tensors: "
            f"{_tell_reason(path, error)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary")
    return {name: _strip(value) if _is_weights(value) else value for name, value in checkpoint.items()}


def _tell_reason(path: Path, error: Exception) -> str:
    """Why `torch.load` has refused a file. Its own texts advise to run the code in it."""
    if path.suffix in PROGRAMS:
        return f"it is a program for {PROGRAMS[path.suffix]}; name what it was exported from"
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle of a version of PyTorch before 1.6
        return "it is not a PyTorch file. Weights are .pth.tar or .safetensors files"
    text = str(error)
    function = re.search(r"GLOBAL (\S+)", text)
    if function is not None:
        return f"it holds more than tensors and numbers: {function[1]}, which is not run"
    if "weights_only" in text:
        return "it holds something other than tensors and numbers"
    return text.splitlines()[0].partition(" This is an internal")[0] if text else type(error).__name__


def get_part(checkpoint: Mapping[str, Any], part: str, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dictionary of one part, e.g. `target_encoder`.

    Raises:
        WeightsError: the part is not there; the message lists those that are.
    """
    weights = checkpoint.get(part)
    if weights is None or not _is_weights(weights):
        parts = ", ".join(name for name, value in checkpoint.items() if _is_weights(value)) or "none"
        single = [name for name, value in checkpoint.items() if isinstance(value, Tensor)]
        if single:
            parts += f". {len(single)} tensors belong to no part, such as {single[0]}"
        hint = "; official DMT-JEPA checkpoints do not hold the aggregation head" if part.endswith("head") else ""
        raise WeightsError(f"{source} has no weights of {part}; it has those of: {parts}{hint}")
    return weights


def select_module(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The state dictionary of one module of the model, from the tensors of a checkpoint folder."""
    prefix = f"model.{module}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_finite(weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        WeightsError: the message names the first such tensor.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(
                f"{source} holds values that are not finite ({name}): the run has diverged; take an earlier file or "
                f"checkpoint"
            )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy weights into a module, by name and strictly; nothing is changed unless all fit.

    A position embedding of another square grid is resampled to the grid of the module, and a warning says so.

    Raises:
        WeightsError: names are missing or unexpected, or shapes differ; the message lists them and, for an encoder,
            says which model the weights are of.
    """
    module.load_state_dict(_fit(module, _strip(weights), source))


def _fit(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The weights, with the position embedding resampled to the grid of the module.

    Raises:
        WeightsError: they do not fit.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if missing or unexpected or not all(_is_resampled(name, weights[name], own[name]) for name in unlike):
        raise WeightsError(_describe_misfit(module, weights, source, missing, unexpected, unlike))
    return {**weights, **{name: _resample(name, weights[name], module, source) for name in unlike}}


def _is_resampled(name: str, given: Tensor, own: Tensor) -> bool:
    """Whether a tensor of another shape is a position embedding [1, N, D] of a square grid, and of the right width."""
    alike = given.ndim == own.ndim == 3 and given.shape[::2] == own.shape[::2]
    return name in POSITION_EMBEDDINGS and alike and math.isqrt(given.shape[1]) ** 2 == given.shape[1] > 0


def _resample(name: str, given: Tensor, module: Any, source: str | os.PathLike[str]) -> Tensor:
    side, grid_size = math.isqrt(given.shape[1]), module.grid_size
    if not dist.is_initialized() or dist.get_rank() == 0:  # all ranks load the same weights
        logger.warning(
            "%s: the position embedding (%s) is made for %dx%d patches and is resampled to %dx%d",
            source, name, side, side, *grid_size,
        )  # fmt: skip
    return resample_position_embedding(given[0], (side, side), grid_size)[None]


def _describe_misfit(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | os.PathLike[str],
    missing: list[str],
    unexpected: list[str],
    unlike: list[str],
) -> str:
    own = module.state_dict()
    faults = [f"the weights in {source} do not fit the {type(module).__name__}"]
    if "patch_embed.proj.weight" in own and is_encoder(weights):
        faults.append(f"  the file holds {describe_encoder(weights)}")
        faults.append(f"  the model is {describe_encoder(own)}")
        faults.append(
            "  set meta.model_name, mask.patch_size, data.crop_size and data.channels to the file's, or choose another "
            "file"
        )
    shapes = [f"{name} is {list(weights[name].shape)}, the model's is {list(own[name].shape)}" for name in unlike]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            faults.append(f"  {title}: {', '.join(names[:MAX_LISTED])}{more}")
    return "\n".join(faults)


def load_model(model: DMTJEPA, path: str | os.PathLike[str]) -> list[str]:
    """Start a model from a checkpoint: student and teacher, by name and strictly; nothing is changed unless all fit.

    Position embeddings of another grid are resampled, see `load_weights`.

    Official files hold no aggregation heads, and files of Hugging Face and timm no predictor either. What a file does
    not hold keeps the weights it was drawn with.

    Returns:
        The parts that the file does not hold; tell the user.

    Raises:
        WeightsError: the file cannot be read, has no encoder, predictor or target_encoder, or one of the two heads
            only, or does not fit.
    """
    checkpoint = read_checkpoint(path)
    heads = [] if model.head is None else ["head", "target_head"]
    absent = [] if any(part in checkpoint for part in heads) else heads
    if is_encoder_file(Path(path)):
        absent = ["predictor", *heads]
    parts = [part for part in ("encoder", "predictor", "target_encoder", *heads) if part not in absent]
    modules: dict[str, nn.Module] = {part: getattr(model, MODULES[part]) for part in parts}
    weights = {
        part: _fit(module, get_part(checkpoint, part, path), f"{part} of {path}") for part, module in modules.items()
    }
    for part, module in modules.items():
        module.load_state_dict(weights[part])
    return absent


def describe_encoder(weights: Mapping[str, Tensor], source: str | os.PathLike[str] = "the file") -> EncoderShape:
    """Size of the encoder that weights belong to, from their shapes.

    Args:
        source: of the weights, for the error.

    Raises:
        WeightsError: they are not an encoder's.
    """
    if not is_encoder(weights):
        raise WeightsError(f"{source} holds no encoder of I-JEPA, but {', '.join(list(weights)[:MAX_LISTED])}")
    embed_dim, num_channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    hidden_dim = weights["blocks.0.mlp.fc1.weight"].shape[0]
    names = [
        name
        for name, size in ARCHITECTURES.items()
        if (size["embed_dim"], size["depth"], int(size["embed_dim"] * size["mlp_ratio"]))
        == (embed_dim, depth, hidden_dim)
    ]
    return EncoderShape(
        names[0] if names else None,
        embed_dim,
        depth,
        hidden_dim,
        patch_size,
        weights["pos_embed"].shape[1],
        num_channels,
    )


def build_encoder(
    weights: Mapping[str, Tensor],
    source: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    normalization: Normalization = (None, None),
    attention: str = "auto",
    device_type: str = "cpu",
) -> VisionTransformer:
    """The encoder that the weights belong to, with them loaded, in evaluation mode.

    Args:
        image_size: height and width, or the side of a square, to make the encoder for. None takes the square that
            the position embedding is made for; it is resampled to any other size, see `load_weights`.
        normalization: mean and standard deviation of each channel, see `find_normalization`.

    Raises:
        WeightsError: the weights are of no architecture known here, the grid is not square and no size is given, or
            the size is not a multiple of the patch size.
    """
    weights = _strip(weights)
    shape = describe_encoder(weights, source)
    if shape.model_name is None:
        raise WeightsError(f"{source} holds {shape}; known are {', '.join(ARCHITECTURES)}")
    if image_size is None:
        side = round(shape.num_patches**0.5)
        if side**2 != shape.num_patches:
            raise WeightsError(f"{source} holds {shape}: give the image size it was trained on")
        image_size = side * shape.patch_size
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, numbers.Integral) for side in sides):
        raise WeightsError(f"image_size must be an int or (height, width), not {image_size!r}")
    size: dict[str, Any] = dict(ARCHITECTURES[shape.model_name], num_channels=shape.num_channels)
    size |= dict(zip(("mean", "std"), normalization, strict=True))
    try:
        encoder = VisionTransformer(sides, shape.patch_size, **size, attention=attention, device_type=device_type)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    load_weights(encoder, weights, source)
    return encoder.eval()


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def is_encoder(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of an encoder's."""
    return {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= weights.keys()


def _strip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in weights.items()}
