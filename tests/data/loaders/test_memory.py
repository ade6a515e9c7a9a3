"""Memory of the loaders is flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.images import LOADERS

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("loader_name", LOADERS)
def test_memory_is_flat_over_1000_batches(image_folder: Path, loader_name: str):
    command = [sys.executable, "-m", "tests.helpers.loader_memory", str(image_folder), loader_name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert len(measured) == 4
    # Allocators grow at first. After that, a leak of one crop, 3 KB, per batch adds 3 MB to 1000 batches.
    assert measured[-1] - measured[1] < 1.5e6, measured
