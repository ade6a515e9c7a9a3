"""Fixtures for short runs."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.one_thread import _one_thread
from tests.helpers.run_folders import write_images, write_masks
from tests.helpers.runs import (
    _fork_server,
    _program_server,
    _quiet,
    _tiny_architecture,
    image_folder,
    losses,
    plain,
    settings,
    settings_in,
    start,
    weights,
)


@pytest.fixture(scope="package")
def labelled(tmp_path_factory) -> Path:
    """train/ and val/ of 3 classes, 10 and 4 images each, and masks."""
    folder = tmp_path_factory.mktemp("labelled")
    write_images(folder / "train", 10, seed=0)
    write_images(folder / "val", 4, seed=1)
    write_masks(folder)
    return folder


@pytest.fixture
def _alone():
    """This process is a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
