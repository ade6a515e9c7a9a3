"""Fixtures for short runs of a tiny network on CPU processes; a conftest.py imports those that its tests use."""

from __future__ import annotations

import csv
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dmtjepa.config import Config, parse_config
from dmtjepa.models import ARCHITECTURES
from dmtjepa.training.fork_server import start_fork_server
from dmtjepa.training.launch import launch
from dmtjepa.training.step import TrainStep
from tests.helpers.program_server import ForkedProgram, ProgramServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package", autouse=True)
def _tiny_architecture():
    """The tiny network in this process too, for these tests alone: other tests know the real `vit_tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_tiny", ARCHITECTURES["vit_tiny"])  # what is put back
        patch.setattr(TrainStep, "__call__", TrainStep.__call__)
        sys.modules.pop("tests.helpers.tiny_architecture", None)
        importlib.import_module("tests.helpers.tiny_architecture")
        yield


@pytest.fixture(scope="session", autouse=True)
def _fork_server():
    """Processes of `launch` fork from one server, which knows the tiny network and computes on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        start_fork_server(["tests.helpers.tiny_architecture"])


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    """torch.distributed.checkpoint logs hundreds of lines per save at DEBUG, which pytest collects."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """128 smooth random images of 32x32 pixels."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(128):
        pixels = generator.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def settings_in(image_folder) -> Callable[..., Config]:
    """settings_in(folder, **{"data.batch_size": 4}) -> the settings of a run of 3 epochs of 8 steps in `folder`."""

    def build(folder: Path, **changes) -> Config:
        values = {
            "data": {
                "batch_size": 16,
                "crop_size": 32,
                "crop_scale": [0.5, 1.0],
                "root_path": str(image_folder),
                "num_workers": 0,
                "loader": "pil",
            },
            "logging": {"folder": str(folder)},
            "mask": {"patch_size": 4, "min_keep": 4, "context_cut": "global"},
            "patch": {"local_agg_head": True},
            "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 16},
            "optimization": {"epochs": 3, "warmup": 1, "lr": 2e-3},
            "runtime": {"log_every": 3, "start_timeout": 600, "hang_timeout": 3600},
        }
        for key, value in changes.items():
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = value
        return parse_config(values)

    return build


@pytest.fixture
def settings(settings_in, tmp_path) -> Callable[..., Config]:
    """settings("run", **{"data.batch_size": 4}) -> the settings of a run in tmp_path/run."""
    return lambda name="run", **changes: settings_in(tmp_path / name, **changes)


@pytest.fixture(scope="package")
def plain(settings_in, tmp_path_factory, _tiny_architecture, _one_thread) -> Config:
    """An uninterrupted run on one process."""
    config = settings_in(tmp_path_factory.mktemp("plain"))
    assert launch(config, ["cpu"]) == 0
    return config


@pytest.fixture(scope="session")
def _program_server() -> Iterator[ProgramServer]:
    server = ProgramServer()
    yield server
    server.close()


@pytest.fixture
def start(_program_server, tmp_path) -> Iterator[Callable[..., ForkedProgram]]:
    """start(config, "cpu", "cpu") -> main.py as a process of its own, in a session of its own."""
    started = []

    def run(config: Config, *devices: str, **options) -> ForkedProgram:
        path = tmp_path / f"settings-{len(started)}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        arguments = ["main.py", "--fname", str(path), "--devices", *(devices or ["cpu"])]
        started.append(_program_server.start(arguments, **options))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def losses() -> Callable[..., list[float]]:
    """losses(config) -> the losses that a run has written, one per step."""

    def read(config: Config, rank: int = 0) -> list[float]:
        with Path(config.logging.folder, f"{config.logging.write_tag}_r{rank}.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    return read


@pytest.fixture
def weights() -> Callable[[Config], dict[str, torch.Tensor]]:
    """weights(config) -> everything in the export `latest`, by name."""

    def read(config: Config) -> dict[str, torch.Tensor]:
        path = Path(config.logging.folder, f"{config.logging.write_tag}-latest.pth.tar")
        values = torch.load(path, weights_only=True)
        parts = ("encoder", "predictor", "target_encoder", "head", "target_head")
        return {f"{part}.{name}": tensor for part in parts for name, tensor in values[part].items()}

    return read
