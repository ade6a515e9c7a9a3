"""`main.py` as a new user gets it wrong: a clear message, an exit code that is not 0, and nothing written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from dmtjepa.config import load_config

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("data.batch_size=4") -> exit code and standard error of main.py, writing to tmp_path/run."""
    monkeypatch.setenv("DMTJEPA_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str, fname: str = QUICKSTART, devices: tuple[str, ...] = ("cpu",)) -> tuple[int, str]:
        folder = f"logging.folder={tmp_path / 'run'}"
        monkeypatch.setattr(sys, "argv", ["main.py", "--fname", fname, "--devices", *devices, folder, *arguments])
        code = main.main()
        return code, capsys.readouterr().err

    return call


def on_folder(folder: Path, *more: str) -> list[str]:
    return ["data.dataset=folder", f"data.root_path={folder}", "data.num_workers=0", "data.loader=torchvision", *more]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.batchsize=4"], ["data.batchsize", "did you mean batch_size?"]),
        (["data.crop_size=4"], ["data.crop_size", "smaller than a patch"]),
        (["data.crop_size=8"], ["patch.patch_k_size", "larger than the grid of 1x1"]),
        (["mask.min_keep=30"], ["min_keep 30", "lower mask.min_keep"]),
        (["data.dataset=folder"], ["data.root_path", "shapes"]),
        (on_folder(Path("/nowhere/at/all")), ["/nowhere/at/all", "does not exist", "data.root_path"]),
    ],
)  # fmt: skip
def test_wrong_settings(run, tmp_path, arguments, words):
    code, error = run(*arguments)
    assert code == 1
    for word in words:
        assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_settings_file(run):
    code, error = run(fname=QUICKSTART.replace("quickstart", "quickstrat"))
    assert code == 1
    assert "did you mean" in error
    assert "quickstart.yaml" in error


def test_empty_folder(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, error = run(*on_folder(tmp_path / "empty"))
    assert code == 1
    assert str(tmp_path / "empty") in error
    assert ".jpg" in error


def test_batch_larger_than_the_data_set(run, images):
    code, error = run(*on_folder(images, "data.batch_size=8"))
    assert code == 1
    assert "batch" in error
    assert "6 images" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(run, tmp_path):
    code, error = run(devices=("cuda:0",))
    assert code == 1
    assert "cuda:0" in error
    assert "--devices cpu" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(run, images, tmp_path):
    short = ("meta.pred_depth=1", "optimization.epochs=1", "optimization.warmup=0")
    small = on_folder(images, "data.batch_size=2", *short)
    code, error = run(*small)
    assert code == 0, error
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, error = run(*small, "optimization.lr=0.5")
    assert code == 1
    assert "optimization.lr" in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    # The same settings again: the run is complete, and stays as it is.
    code, error = run(*small)
    assert code == 0
    assert "step 3 of 3" in error


def test_dry_run_starts_nothing(run, tmp_path, capsys):
    code, _ = run("--dry-run", "data.batch_size=4", fname=str(ROOT / "configs" / "in1k_vitb16_ep600.yaml"))
    assert code == 0
    assert not (tmp_path / "run").exists()


def test_dry_run_tells_what_a_run_needs(monkeypatch, capsys):
    fname = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
    monkeypatch.setattr(sys, "argv", ["main.py", "--fname", fname, "--devices", "cpu", "--dry-run"])
    assert main.main() == 0
    printed = capsys.readouterr().out
    for word in ("effective batch", "learning rate", "parameters", "FLOPs per image", "memory of a device"):
        assert word in printed
    assert load_config(fname).meta.model_name in printed
