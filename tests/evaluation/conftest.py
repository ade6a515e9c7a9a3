"""A run folder as training leaves it, and a small labelled data set whose classes differ in colour."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.retrieval import NearestImages
from dmtjepa.evaluation.segmentation import SegmentedImages
from dmtjepa.step_csv import LossCurve
from tests.helpers.one_thread import _one_thread
from tests.helpers.reports import HOSTILE
from tests.helpers.run_folders import write_images, write_masks, write_run


@pytest.fixture(scope="session")
def run_template(data, tmp_path_factory) -> Path:
    """A run folder on `data` that no test changes; `run` is a copy of it."""
    return write_run(tmp_path_factory.mktemp("template") / "run", data)


@pytest.fixture
def run(run_template, tmp_path) -> Path:
    """A run folder on `data` for one test. Its files are hard links: replace them, do not write into them."""
    return Path(shutil.copytree(run_template, tmp_path / "run", copy_function=os.link))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train/ and val/ of 3 classes, 10 and 4 images each, and masks."""
    folder = tmp_path_factory.mktemp("images") / "colors"
    write_images(folder / "train", 10, seed=0)
    write_images(folder / "val", 4, seed=1)
    write_masks(folder)
    return folder


@pytest.fixture(scope="session")
def everything():
    """All data that figures can show: 3 images of 32x48 pixels with 4x6 patches of 8."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 2, 3, 32, 48), dtype=torch.uint8, generator=generator)
    classes = [HOSTILE, "cat", "$x$"]
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
        segmented=SegmentedImages(
            pixels[:2, 0],
            torch.randint(4, (2, 32, 48), dtype=torch.uint8, generator=generator),
            {name: torch.randint(4, (2, 4, 6), generator=generator) for name in ("trained", "untrained", "pixels")},
        ),
        nearest=NearestImages(pixels, torch.rand(3, 2), classes, [[name, "cat"] for name in classes]),
    )
