"""Short runs of a tiny network for tests/kill_test.py, and what must be in their folders after a kill."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

import dmtjepa.training.launch  # noqa: F401
import main as training
import tests.helpers.tiny_architecture  # noqa: F401
from dmtjepa import checkpoint_format
from dmtjepa.cli import evaluate
from dmtjepa.run_folder import RunFolder
from tests.helpers.programs import Program

STEPS_PER_EPOCH, NUM_EPOCHS = 8, 3
NUM_STEPS = STEPS_PER_EPOCH * NUM_EPOCHS
SAVE_EVERY = 3


class Setup(NamedTuple):
    """How a run is trained."""

    processes: int
    loader: str
    workers: int

    def __str__(self) -> str:
        return f"{self.processes} process{'es' * (self.processes > 1)}, {self.loader}"


class Lost(AssertionError):
    """Something that a kill must not do."""


class Run:
    """A run folder, and the programs that write into it."""

    def __init__(self, folder: Path, images: Path, setup: Setup) -> None:
        self.setup = setup
        self.files = RunFolder(folder, "jepa")
        self.settings = folder.with_name(f"{folder.name}.yaml")
        self.log = folder.with_name(f"{folder.name}.log")
        values = {
            "data": {
                "batch_size": 8 // setup.processes, "crop_size": 32, "root_path": str(images),
                "num_workers": setup.workers, "loader": setup.loader,
            },
            "logging": {"folder": str(folder)},
            "mask": {"patch_size": 4, "min_keep": 4},
            "patch": {"local_agg_head": True},
            "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 16},
            "optimization": {"epochs": NUM_EPOCHS, "warmup": 1},
            "runtime": {
                "log_every": 1, "save_every_steps": SAVE_EVERY, "keep_every_epochs": 1, "start_timeout": 600,
                "hang_timeout": 3600,
            },
        }  # fmt: skip
        self.settings.write_text(yaml.safe_dump(values))

    def train(self) -> Program:
        devices = ["cpu"] * self.setup.processes
        return Program(training.main, ["main.py", "--fname", str(self.settings), "--devices", *devices], self.log)

    def evaluate(self) -> Program:
        arguments = ["evaluation", str(self.files.path), "--device", "cpu", "--num-workers", "2"]
        return Program(evaluate.main, arguments, self.log)

    def losses(self, rank: int = 0) -> list[str]:
        """The losses in the CSV of a rank; a line that is not complete does not count."""
        path = self.files.csv_file(rank)
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [row["loss"] for row in csv.DictReader(file) if row["time (ms)"]]

    def table(self) -> str:
        """The CSV of the first rank as it is."""
        path = self.files.csv_file(0)
        return path.read_text() if path.exists() else ""

    def newest_published(self) -> int:
        """Steps of the newest published checkpoint; 0 without any."""
        found = checkpoint_format.list_checkpoints(self.files.checkpoints)
        return max(map(checkpoint_format.step_of, found), default=0)

    def newest_whole(self) -> int:
        """Steps of the newest checkpoint that is whole; 0 without any."""
        found = checkpoint_format.newest_whole(self.files.checkpoints)
        return 0 if found is None else checkpoint_format.step_of(found)

    def exports(self) -> set[str]:
        return {path.name for path in self.files.path.glob("jepa-*.pth.tar")}

    def check_files(self, exports: set[str]) -> None:
        """Every file that is replaced as a whole is whole, and those exports are there."""
        require(exports <= self.exports(), f"exports are gone: {sorted(exports - self.exports())}")
        for name in sorted(self.exports()):
            with zipfile.ZipFile(self.files.path / name) as archive:
                require(archive.testzip() is None, f"{name} is damaged")
        for path in self.files.path.rglob("*.json"):
            if not any(part.startswith(".") for part in path.relative_to(self.files.path).parts):
                json.loads(path.read_text())
        if self.files.config_file.exists():
            require(bool(yaml.safe_load(self.files.config_file.read_text())), "config.yaml is empty")


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Lost(reason)


def write_images(folder: Path) -> None:
    """An epoch of labelled images of 32x32 pixels."""
    generator = np.random.default_rng(0)
    for index in range(STEPS_PER_EPOCH * 8):
        path = folder / "train" / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(path)


def digest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a run but its report."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "report" not in path.relative_to(folder).parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def check_same_result(first: Run, second: Run) -> None:
    """Two finished runs have equal losses, weights and exports, bit by bit."""
    for rank in range(first.setup.processes):
        losses = second.losses(rank)
        require(len(losses) == NUM_STEPS, f"rank {rank} has {len(losses)} rows at the end")
        require(losses == first.losses(rank), f"other losses at the end of rank {rank}")
    second.check_files(first.exports())
    pid = os.fork()
    if pid == 0:  # a process that has computed must not fork
        with contextlib.suppress(BaseException):
            compare_tensors(first, second)
            os._exit(0)
        os._exit(1)
    require(os.waitpid(pid, 0)[1] == 0, "other weights at the end, in the checkpoint or an export")


def compare_tensors(first: Run, second: Run) -> None:
    def read(run: Run) -> dict[str, torch.Tensor]:
        state = checkpoint_format.load_full(checkpoint_format.find_checkpoint(run.files.checkpoints))
        # The generators' states are no result: each start of a loader draws from them a seed that nothing uses.
        found = {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}
        for name in sorted(first.exports()):
            file = torch.load(run.files.path / name, weights_only=True)
            parts = {key: value for key, value in file.items() if isinstance(value, dict)}
            for part, tensors in parts.items():
                found |= {f"{name}.{part}.{key}": t for key, t in tensors.items() if isinstance(t, torch.Tensor)}
        return found

    old, new = read(first), read(second)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
