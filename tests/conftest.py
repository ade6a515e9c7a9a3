"""Shared by all tests: images and settings of short runs. Tests marked `gpu` are skipped where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.config import Config, parse_config

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: without a GPU, its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
                "loader": "torchvision",
            },
            "logging": {"folder": str(folder)},
            "mask": {"patch_size": 4, "min_keep": 4, "context_cut": "global"},
            "patch": {"local_agg_head": True},
            "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 16},
            "optimization": {"epochs": 3, "warmup": 1, "lr": 2e-3},
            "runtime": {"log_every": 3, "start_timeout": 60, "hang_timeout": 120},
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
