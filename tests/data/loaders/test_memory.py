"""Memory of the loaders is flat."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest

from dmtjepa.config import DataSettings
from dmtjepa.data import build_loader
from tests.helpers.images import LOADERS


def children() -> set[Path]:
    own = Path("/proc/self")
    return {Path("/proc", pid) for pid in (own / "task" / own.resolve().name / "children").read_text().split()}


def written_memory(others: set[Path]) -> int:
    """Bytes that this process and its children, apart from `others`, have written and share with nobody.

    Clean pages are left out: those of a library become private when another program that uses it ends.
    """
    total = 0
    for process in (Path("/proc/self"), *(children() - others)):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty"):
                total += 1024 * int(line.split()[1])
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("loader_name", LOADERS)
def test_memory_is_flat_over_2000_batches(image_folder: Path, loader_name: str):
    settings = DataSettings(root_path=str(image_folder), batch_size=5, crop_size=32, num_workers=2, loader=loader_name)
    gc.collect()
    gc.freeze()  # else a collection in a worker writes to every page that it shares with this process
    others = children()  # of other tests, such as a fork server
    loader = build_loader(settings, seed=0)
    measured = []
    batches = (images for epoch in range(10_000) for images in loader.epoch(epoch))
    for step, _ in enumerate(batches, 1):
        if step % 500 == 0:
            gc.collect()
            measured.append(written_memory(others))
        if step == 3000:
            break
    batches.close()
    loader.close()
    gc.unfreeze()
    assert len(measured) == 6
    # A leak of one crop, 3 KB, per batch adds 1.5 MB to every interval. Allocators grow at first, and then by less.
    growth = [later - earlier for earlier, later in itertools.pairwise(measured)]
    assert min(growth) < 1e6, measured
