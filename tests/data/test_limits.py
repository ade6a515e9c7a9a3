"""A run that lacks memory, file descriptors or shared memory ends and says so; no image is replaced."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.cli import check
from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, FolderSource, build_eval_loader, build_loader
from tests.helpers.images import LOADERS


def fail(self: FolderSource, image: int) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_ends_where_no_file_can_be_opened(
    settings: DataSettings, loader_name: str, num_workers: int, monkeypatch
):
    monkeypatch.setattr(FolderSource, "read", fail)
    changes = {"loader": loader_name, "num_workers": num_workers, "max_broken": 1}
    loader = build_loader(settings.model_copy(update=changes), seed=0)
    with pytest.raises(DataError, match=r"^a process of this run has as many open files as it may have .*ulimit -n"):
        next(loader.epoch(0))
    assert not loader.corrupt
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_ends_where_no_file_can_be_opened(image_folder: Path, num_workers: int, monkeypatch):
    monkeypatch.setattr(FolderSource, "read", fail)
    with pytest.raises(DataError, match=r"^a process of this run has as many open files"):
        next(iter(build_eval_loader(image_folder, 16, 4, num_workers=num_workers)))


def test_the_check_of_a_data_set_ends_too(image_folder: Path, monkeypatch, capsys):
    monkeypatch.setattr(FolderSource, "read", fail)
    assert check.main([str(image_folder), "--workers", "1"]) == 2
    assert "as many open files" in capsys.readouterr().err


@pytest.mark.parametrize("loader_name", LOADERS)
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_images_above_the_limit_are_refused_by_both_loaders(tmp_path: Path, loader_name: str, form: str):
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.{form}")
    Image.new("RGB", (400, 100)).save(tmp_path / f"large.{form}")
    settings = DataSettings(
        root_path=str(tmp_path), batch_size=5, crop_size=16, num_workers=0, loader=loader_name, max_broken=0.5,
        max_megapixels=0.01,
    )  # fmt: skip
    loader = build_loader(settings, seed=0)
    assert len(next(loader.epoch(0))) == 5
    assert loader.corrupt == [(str(tmp_path / f"large.{form}"), "400x100 pixels exceed data.max_megapixels = 0.01")]
    loader.close()


def test_the_check_of_a_data_set_has_the_limit_of_a_run(image_folder: Path, capsys):
    """The images have thousands of pixels, the limit is a thousand."""
    assert check.main([str(image_folder), "--workers", "1", "--max-megapixels", "0.001"]) == 1
    assert capsys.readouterr().out.count("pixels exceed data.max_megapixels = 0.001") == 30


def test_the_memory_that_is_left_is_found_out():
    """In a fresh process with room for 64 MiB more: a process that has freed much can allocate that again."""
    program = """
import resource
from pathlib import Path
from dmtjepa.data.resources import is_memory_left
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print([is_memory_left(num_bytes) for num_bytes in (1 << 20, 1 << 30, 0)])
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "[True, False, False]\n"
