"""Folders of images for the data tests, drawn once per session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.config import DataSettings
from dmtjepa.data import is_dali_installed

needs_dali = pytest.mark.skipif(not is_dali_installed(), reason="NVIDIA DALI is not installed")


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture with some structure at low frequencies, so that JPEG and resizing change it little."""
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEG files of different sizes in three classes, in folders of different depth."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(30):
        place = folder / ("ant", "bee/worker", "cat")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 160, 2).tolist()
        smooth_image(rng, width, height).save(place / f"{number:03d}.jpg", quality=90)
    return folder


@pytest.fixture
def settings(image_folder: Path) -> DataSettings:
    """Small crops of that folder, made in the test's own process."""
    return DataSettings(
        root_path=str(image_folder), batch_size=4, crop_size=32, num_workers=0, loader="torchvision", max_broken=0.2
    )
