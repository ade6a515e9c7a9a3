"""Small labelled images, and run folders as training leaves them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dmtjepa.config import parse_config
from dmtjepa.objective import build_model

NUM_CLASSES = 3


def write_images(folder: Path, per_class: int, seed: int, side: int = 32) -> None:
    """Images of noise around one colour per class, in a folder per class."""
    rng = np.random.default_rng(seed)
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for label in range(NUM_CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = colors[label] + rng.normal(0, 40, (side, side, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")


def write_masks(data: Path) -> None:
    """Write a mask for every image below `data`: background in the left half, the class in the right half."""
    for image in list(data.glob("*/class*/*.png")):
        label = int(image.parent.name[-1])
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[:, 16:] = 1 + label
        path = data / "masks" / image.relative_to(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def write_run(folder: Path, data: Path, /, **sections) -> Path:
    """A run folder with settings, a loss CSV, and a checkpoint of untrained weights of another seed than the run's."""
    values = {
        "data": {"root_path": str(data.parent), "image_folder": data.name, "crop_size": 32, "batch_size": 4},
        "mask": {"patch_size": 4, "min_keep": 2},
        "patch": {"local_agg_head": True},
        "meta": {"model_name": "vit_nano", "pred_depth": 1, "pred_emb_dim": 48},
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
