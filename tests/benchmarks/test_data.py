"""The programs that measure loaders, from end to end on a CPU, and the goals that their results decide."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import goals, gpu_check
from benchmarks.data import data_wait, decode
from benchmarks.data import loader as loader_speed
from dmtjepa.data import is_dali_installed

needs_dali = pytest.mark.skipif(not is_dali_installed(), reason="NVIDIA DALI is not installed")


def run(monkeypatch, program, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, options)])
    program.main()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["pil", pytest.param("dali", marks=needs_dali)])
def test_the_trainers_own_share_of_waiting(image_folder: Path, tmp_path: Path, tiny, monkeypatch, capsys, loader: str):
    options = ("--workload", "vit_nano:2", "--loader", loader, "--workers", 1, "--device", "cpu")
    options += ("--steps", 20, "--warmup", 10, "--out", tmp_path, "--set", *tiny)
    run(monkeypatch, data_wait, image_folder, *options)
    (path,) = tmp_path.glob("cpu-*-data-wait.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["loader"], row["steps"]) == (loader, 10)
    assert 0 <= row["data_wait_share"] <= 1
    assert row["trained_images_per_s"] > 0
    assert f"{row['data_wait_share']:.1%}" in capsys.readouterr().out


@pytest.mark.slow
@needs_dali
def test_rates_beside_what_training_needs(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    options = ("--workers", 1, "--batch-size", 4, "--images", 40, "--batches", 20, "--rounds", 1)
    run(monkeypatch, loader_speed, image_folder, *options, "--json", tmp_path / "loader.json")
    document = json.loads((tmp_path / "loader.json").read_text())
    assert [row["loader"] for row in document["rows"]] == [
        "pil, folder", "pil, tar", "dali, folder", "dali, tar",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for row in document["rows"]:
        assert row["images_per_second"] > 0
        assert row["images_per_core_second"] > 0
        assert row["loader"] in printed
    assert "H100, ViT-L/16" in printed


def test_decoders_are_compared(tmp_path: Path, monkeypatch, capsys):
    run(monkeypatch, decode, "--images", 2, "--rounds", 1, "--out", tmp_path)
    (path,) = tmp_path.glob("cpu-*-decode.json")
    document = json.loads(path.read_text())
    times = {row["case"]: row["ms"] for row in document["rows"]}
    names = ("PIL", "PIL, to the crop", "torchvision.io", "torchvision.io, to the crop")
    assert [name for name in times if not name.startswith("TorchCodec")] == list(names)
    assert min(times.values()) > 0
    assert document["images"] == {"count": 2, "mean_size": [500, 375], "drawn": True}
    assert "torchvision.io, to the crop" in capsys.readouterr().out


def test_decoders_need_an_image(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, decode, "--images", 0)
    assert "--images and --rounds must be at least 1" in capsys.readouterr().err


def test_a_decoder_of_other_pixels_is_not_timed(monkeypatch):
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda data, mode: torch.zeros(3, 375, 500, dtype=torch.uint8))
    rows, notes = decode.measure([decode.draw_jpeg(0)], 1)
    assert "torchvision.io is not timed: 1 of 1 images have other pixels than with PIL" in notes
    assert not any(row["case"].startswith("torchvision.io") for row in rows)


def test_goals_of_the_data():
    rows = [
        {"loader": "dali, folder", "images_per_second": 3100.0, "images_per_core_second": 400.0},
        {"loader": "torchvision, folder", "images_per_second": 900.0, "images_per_core_second": 300.0},
        {"loader": "dali", "workload": "ViT-large/16 B=256", "data_wait_share": 0.031},
    ]
    assert goals.data_goals(rows) == {
        "dali, folder: at least 2x the images/s of training ViT-L (1.9x)": False,  # of the prediction
        "ViT-large/16 B=256: waits for data in less than 2% of the time (3.1%)": False,
    }
    rows.append({"workload": "ViT-large/16 B=256", "images_per_s": 1500.0, "mfu": 0.5})
    assert goals.data_goals(rows)["dali, folder: at least 2x the images/s of training ViT-L (2.1x)"]


def test_a_gpu_check_with_images_measures_both(tmp_path: Path):
    programs = {"benchmarks.data.loader", "benchmarks.data.data_wait"}
    with_images = gpu_check.steps(tmp_path, tmp_path / "images", None)
    assert programs <= {word for step in with_images for word in step.command}
    assert not programs & {word for step in gpu_check.steps(tmp_path, None, None) for word in step.command}
