"""Short runs of a tiny network on CPU processes."""

from __future__ import annotations

import csv
import importlib
import logging
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
from dmtjepa.config import Config  # noqa: E402
from dmtjepa.models import ARCHITECTURES  # noqa: E402
from dmtjepa.training.launch import launch  # noqa: E402


@pytest.fixture(scope="package", autouse=True)
def _tiny_architecture():
    """The tiny network in this process too, for these tests alone: other tests know the real `vit_tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_tiny", ARCHITECTURES["vit_tiny"])  # what is put back
        sys.modules.pop("tiny_architecture", None)
        importlib.import_module("tiny_architecture")
        yield


@pytest.fixture(scope="session", autouse=True)
def _fork_server():
    """Processes of `launch` fork from one server, which knows the tiny network and computes on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
        multiprocessing.forkserver.set_forkserver_preload(["dmtjepa.training.launch", "tiny_architecture"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    """torch.distributed.checkpoint logs hundreds of lines per save at DEBUG, which pytest collects."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Another number of threads sums in another order: runs are compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def plain(settings_in, tmp_path_factory, _tiny_architecture, _one_thread) -> Config:
    """An uninterrupted run on one process."""
    config = settings_in(tmp_path_factory.mktemp("plain"))
    assert launch(config, ["cpu"]) == 0
    return config


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen]:
    """start(config, "cpu", "cpu") -> main.py as a process of its own, in a process group of its own."""
    started = []

    def run(config: Config, *devices: str, **popen) -> subprocess.Popen:
        path = tmp_path / f"settings-{len(started)}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, str(HERE / "tiny_main.py"), "--fname", str(path), "--devices", *(devices or ["cpu"])]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | popen
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
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
