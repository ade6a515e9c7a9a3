"""A run folder as training leaves it, with a small labelled data set that a network can tell apart."""

from __future__ import annotations

import csv
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.config import parse_config
from dmtjepa.evaluation.figures import FigureData, LossCurve
from dmtjepa.objective import build_model

NUM_CLASSES = 3


def write_images(folder: Path, per_class: int, seed: int, side: int = 32) -> None:
    """Pictures of noise around a colour per class, in a folder per class."""
    rng = np.random.default_rng(seed)
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for label in range(NUM_CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = colors[label] + rng.normal(0, 40, (side, side, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")


def write_masks(data: Path) -> None:
    """The mask of every image below data: its left half is the ground, its right half the class."""
    for image in list(data.glob("*/class*/*.png")):
        label = int(image.parent.name[-1])
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[:, 16:] = 1 + label
        path = data / "masks" / image.relative_to(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def write_run(folder: Path, data: Path, **sections) -> Path:
    """A run folder with settings, an untrained checkpoint drawn with another seed than the run's, and a loss CSV."""
    values = {
        "data": {"root_path": str(data.parent), "image_folder": data.name, "crop_size": 32, "batch_size": 4},
        "mask": {"patch_size": 4, "min_keep": 2},
        "patch": {"local_agg_head": True},
        "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 48},
        "logging": {"folder": str(folder), "write_tag": "tiny"},
        "optimization": {"epochs": 2, "warmup": 0},
        "evaluation": {"batch_size": 16},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes
    config = parse_config(values)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(1 + config.runtime.seed)
    model = build_model(config)
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target_encoder": model.teacher_encoder}
    if model.head is not None:
        parts |= {"head": model.head, "target_head": model.teacher_head}
    checkpoint = {name: module.state_dict() for name, module in parts.items()}
    torch.save(
        checkpoint | {"epoch": 2, "loss": 0.3, "batch_size": 4, "world_size": 1, "lr": 1e-3},
        folder / "tiny-latest.pth.tar",
    )
    with (folder / "tiny_r0.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)"])
        for step in range(120):
            writer.writerow([1 + step // 60, step % 60, 0.2 + math.exp(-step / 20), 20, 12, 8.5])
    return folder


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Everything here is small: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_template(data, tmp_path_factory) -> Path:
    """A run folder on `data` that no test changes; `run` is a copy for each."""
    return write_run(tmp_path_factory.mktemp("template") / "run", data)


@pytest.fixture
def run(run_template, tmp_path) -> Path:
    """A run folder on `data` of its own, whose files are links: replace, do not write into them."""
    return Path(shutil.copytree(run_template, tmp_path / "run", copy_function=os.link))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train/ and val/ of 3 classes, 10 and 4 images each, and masks."""
    folder = tmp_path_factory.mktemp("images") / "colors"
    write_images(folder / "train", 10, seed=0)
    write_images(folder / "val", 4, seed=1)
    write_masks(folder)
    return folder


@pytest.fixture
def everything():
    """All data that figures can show: 3 images of 32x48 pixels with 4x6 patches of 8."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.tensor([[0, 1, 6, 7], [9, 10, 15, 16]])
    return FigureData(
        grid_size=(4, 6),
        images=torch.randint(256, (3, 3, 32, 48), dtype=torch.uint8, generator=generator),
        context_index=torch.tensor([2, 3, 8]).expand(3, -1),
        target_index=blocks.expand(3, -1, -1),
        query_index=torch.tensor([7, 10]),
        neighbor_index=torch.tensor([[0, 1, 8, -1], [9, 11, 4, 16]]).expand(3, -1, -1),
        patches=torch.randn(3, 24, 16, generator=generator),
        untrained_patches=torch.randn(3, 24, 16, generator=generator),
        loss=LossCurve(np.linspace(0, 2, 100), np.linspace(1, 0.2, 100)),
        accuracy={"trained": {5: 0.7, 10: 0.8}, "untrained": {5: 0.4, 10: 0.5}, "pixels": {5: 0.3, 10: 0.3}},
        chance=0.1,
    )
