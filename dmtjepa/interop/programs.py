"""Writing an encoder as a program that runs without this project: ONNX, and PyTorch's `.pt2`.

A program takes `images`, float32 [B,C,H,W] normalised by the mean and standard deviation of the encoder, and returns
`patches` [B,N,D] in raster order and `pooled` [B,D], their average. B is free. C, H and W are those of the encoder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmtjepa.files import WRITING, publish, write_atomically
from dmtjepa.interop.errors import MissingPackageError
from dmtjepa.interop.model_folder import check_suffix, describe_preprocessing, image_size
from dmtjepa.interop.weights import check_finite
from dmtjepa.models import VisionTransformer

INPUT = "images"
OUTPUTS = ("patches", "pooled")

MAX_ONNX_BYTES = 2**31 - 2**20
"""Weights above this are written to a second file: a file of protocol buffers holds less than 2 GiB."""


class _Features(nn.Module):
    """What `Encoder.features` computes, as a module."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.encoder(images)
        return patches, patches.mean(1)


def export_onnx(encoder: VisionTransformer, path: Path) -> None:
    """Write `path`, an ONNX file with the preprocessing in its metadata. Needs the packages `onnx` and `onnxscript`.

    Weights of 2 GiB and more are written beside it, into `{path}.data`.

    Raises:
        MissingPackageError: a package is not installed.
        WeightsError: the name does not end with `.onnx`, or a weight is not finite; nothing was written.
    """
    check_suffix(path, ".onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError("export to ONNX", missing)
    program = _trace(encoder)
    with _without_warnings():
        written = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: "batch"}},
            verbose=False,
        )
    assert written is not None
    model = written.model
    model.producer_name = "dmtjepa"
    model.metadata_props["preprocessing"] = json.dumps(describe_preprocessing(encoder))
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if num_bytes <= MAX_ONNX_BYTES:
        write_atomically(path, written.model_proto.SerializeToString())
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=WRITING) as folder:
        written.save(Path(folder, path.name), external_data=True)
        for name in (f"{path.name}.data", path.name):  # the weights first: a file that is there is whole
            publish(Path(folder, name), path.with_name(name))


def export_program(encoder: VisionTransformer, path: Path) -> None:
    """Write `path`, a file for `torch.export.load`, with the preprocessing as the extra file `preprocessing.json`.

    Raises:
        WeightsError: the name does not end with `.pt2`, or a weight is not finite; nothing was written.
    """
    check_suffix(path, ".pt2")
    program = _trace(encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=WRITING) as folder, _without_warnings():
        writing = Path(folder, path.name)
        extra_files = {"preprocessing.json": json.dumps(describe_preprocessing(encoder))}
        torch.export.save(program, writing, extra_files=extra_files)
        publish(writing, path)


def _trace(encoder: VisionTransformer) -> torch.export.ExportedProgram:
    """The program, in float32 on the CPU. Nothing in it says where the source of this project was."""
    check_finite(encoder.state_dict(), "the encoder")
    module = _Features(encoder.cpu().float()).eval().requires_grad_(False)
    images = torch.zeros(2, encoder.num_channels, *image_size(encoder))  # a batch of 1 would be taken for a constant
    batch: dict[str, Any] = {INPUT: {0: torch.export.Dim("batch")}}
    with torch.no_grad(), _without_warnings():
        program = torch.export.export(module, (images,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names and lines of this machine
    return program


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """PyTorch's exporters warn of their own deprecated code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
