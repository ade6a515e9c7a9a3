"""Folders of images for the data tests, drawn once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmtjepa.cli.shards import main as make_shards
from dmtjepa.config import DataSettings
from tests.helpers.images import image_folder


@pytest.fixture
def settings(image_folder: Path) -> DataSettings:
    """Small crops of that folder, made in the test's own process."""
    return DataSettings(
        root_path=str(image_folder), batch_size=4, crop_size=32, num_workers=0, loader="pil", max_broken=0.2
    )


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of that folder in four shards."""
    out = tmp_path_factory.mktemp("shards")
    assert make_shards([str(image_folder), str(out), "--shard-size", "8"]) == 0
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    """No test reads or writes the cache of the user."""
    monkeypatch.setenv("DMTJEPA_CACHE", str(tmp_path / "cache"))
