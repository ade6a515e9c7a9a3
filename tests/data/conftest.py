"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtjepa.config import DataSettings
from tests.helpers.images import image_folder


@pytest.fixture
def settings(image_folder: Path) -> DataSettings:
    """Small crops of that folder, made in the test's own process."""
    return DataSettings(
        root_path=str(image_folder), batch_size=4, crop_size=32, num_workers=0, loader="torchvision", max_broken=0.2
    )
