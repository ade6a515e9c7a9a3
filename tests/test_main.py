"""`main.py` as a new user gets it wrong: a clear message, an exit code that is not 0, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from dmtjepa.config import ConfigError, load_config, parse_config
from dmtjepa.training.check import check_compiler

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_start_that_fails_leaves_nothing_behind(run, images, tmp_path):
    """The corrected command starts, and the settings in the folder are its own."""
    short = ("data.batch_size=2", "meta.pred_depth=1", "optimization.epochs=1", "optimization.warmup=0")
    for wrong in (
        on_folder(images.with_name("imgaes"), *short),
        on_folder(images, *short, "data.batch_size=8"),
        on_folder(images, *short, "meta.load_checkpoint=true", "meta.read_checkpoint=nowhere.pth.tar"),
        on_folder(images, *short, "runtime.accumulation=9"),
        on_folder(images, *short, "mask.min_keep=30"),
        on_folder(images, *short, "meta.pred_emb_dim=31"),
    ):
        code, error = run(*wrong)
        assert code == 1
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()
    code, error = run(*on_folder(images, *short))
    assert code == 0, error
    assert load_config(tmp_path / "run" / "config.yaml").data.root_path == str(images)


@pytest.mark.slow
def test_a_moved_data_set_is_followed(run, images, tmp_path):
    short = ("data.batch_size=2", "meta.pred_depth=1", "optimization.epochs=1", "optimization.warmup=0")
    code, error = run(*on_folder(images, *short))
    assert code == 0, error
    moved = images.rename(tmp_path / "moved")
    code, error = run(*on_folder(moved, *short))
    assert code == 0, error
    assert load_config(tmp_path / "run" / "config.yaml").data.root_path == str(moved)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert starts[-1]["changed_settings"] == {"data.root_path": {"from": str(images), "to": str(moved)}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["mask.min_keep=30"],
        ["meta.pred_emb_dim=31"],
        ["data.image_folder=imgaes"],
        ["data.batch_size=8"],
        ["runtime.accumulation=9"],
        ["meta.load_checkpoint=true", "meta.read_checkpoint=nowhere.pth.tar"],
        ["meta.load_checkpoint=true", "meta.read_checkpoint=FILE"],
        ["data.root_path=$NOT_SET/images"],
        ["runtime.shard_size=2"],
    ],
)
def test_dry_run_says_what_a_start_says(run, images, tmp_path, arguments):
    file = tmp_path / "damaged.pth.tar"
    file.write_bytes(b"PK\3\4 and no more")
    arguments = [text.replace("FILE", str(file)) for text in on_folder(images, "data.batch_size=2", *arguments)]
    dry, dry_error = run("--dry-run", *arguments)
    wet, wet_error = run(*arguments)
    assert (dry, wet) == (1, 1)
    assert dry_error.splitlines()[-1] == wet_error.splitlines()[-1]
    assert "Traceback" not in dry_error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_of_a_started_run(run, images, tmp_path):
    small = on_folder(
        images, "data.batch_size=2", "meta.pred_depth=1", "optimization.epochs=1", "optimization.warmup=0"
    )
    code, error = run(*small)
    assert code == 0, error
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run("--dry-run", *small)[0] == 0
    code, error = run("--dry-run", *small, "optimization.lr=0.5")
    assert code == 1
    assert "optimization.lr" in error
    renamed = (images / "0.jpg").rename(images / "zero.jpg")
    code, error = run("--dry-run", *small)
    assert code == 1
    assert "1 added (zero.jpg), 1 removed (0.jpg)" in error
    renamed.rename(images / "0.jpg")
    for index in range(3):
        shutil.copy(images / "0.jpg", images / f"more{index}.jpg")
    code, error = run("--dry-run", *small)
    assert code == 1
    assert "the data set has changed" in error
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    code, error = run("--dry-run", *small)
    assert code == 1
    assert "are damaged" in error
    assert before.keys() == {path for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("variable", "device_type", "setting", "words"),
    [
        ("CXX", "cpu", {"compile": "on"}, r"runtime\.compile: there is no C\+\+ compiler \(g\+\+\)"),
        ("CC", "cuda", {}, r"runtime\.kernels: triton needs a C compiler \(gcc or clang\)"),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, variable, device_type, setting, words):
    config = parse_config({"runtime": setting})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=words):
        check_compiler(config, device_type)
    (tmp_path / "compiler").write_text("#!/bin/sh\n")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv(variable, "compiler")
    check_compiler(config, device_type)
    monkeypatch.delenv(variable)
    check_compiler(parse_config({"runtime": {"compile": "off", "kernels": "torch"}}), device_type)


@pytest.mark.slow
def test_dry_run_starts_nothing(run, images, tmp_path):
    code, _ = run("--dry-run", "data.batch_size=4", f"data.root_path={images}", "data.image_folder=''",
                  fname=str(ROOT / "configs" / "in1k_vitb16_ep600.yaml"))  # fmt: skip
    assert code == 0
    assert not (tmp_path / "run").exists()


def test_dry_run_tells_what_a_run_needs(monkeypatch, capsys):
    """Even where the images are not, as on a login node; but the exit status tells that a start would fail."""
    fname = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
    monkeypatch.delenv("DATASETS", raising=False)
    monkeypatch.setattr(sys, "argv", ["main.py", "--fname", fname, "--devices", "cpu", "--dry-run"])
    assert main.main() == 1
    printed, error = capsys.readouterr()
    for word in ("effective batch", "learning rate", "parameters", "FLOPs per image", "memory of a device"):
        assert word in printed
    assert load_config(fname).meta.model_name in printed
    assert "data.root_path: $DATASETS contains $DATASETS" in error
