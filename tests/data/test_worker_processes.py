"""Processes that load, check or draw images end with the process that started them, also if that one is killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmtjepa.config import DataSettings
from dmtjepa.data import check
from dmtjepa.data.loaders.center_crop import EvaluationLoader
from dmtjepa.data.loaders.pil import PilLoader

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # only ends a hang


class Endless:
    """Images that are never read to the end. Each process that starts to read one writes a byte into a pipe."""

    class_names: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def __len__(self) -> int:
        return 1024

    def name(self, image: int) -> str:
        return str(image)

    def read(self, image: int) -> bytes:
        os.write(self._pipe, b"x")
        while True:
            signal.pause()


def check_images(source: Endless) -> None:
    check.check(source, 2)


def evaluate_images(source: Endless) -> None:
    next(iter(EvaluationLoader(source, (32, 32), 4, num_workers=2)))


def train_on_images(source: Endless) -> None:
    settings = DataSettings(root_path="images", batch_size=4, crop_size=32, num_workers=2)
    next(PilLoader(source, settings, seed=0).epoch(0))


@pytest.mark.parametrize("work", [check_images, evaluate_images, train_on_images])
def test_workers_end_with_a_killed_parent(work: Callable[[Endless], None]):
    """The workers hold a pipe: its end shows that none of them is left."""
    end, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        try:
            work(Endless(held))
        finally:
            os._exit(1)
    os.close(held)
    for _ in range(2):  # both workers read
        assert os.read(end, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert select.select([end], [], [], TIMEOUT)[0], "workers are left"
    assert os.read(end, 1) == b""
    os.close(end)


def draw_forever(*_: object) -> None:
    """In place of the function that draws images, which would end by itself."""
    os.write(1, b"x")
    while True:
        signal.pause()


DRAW = """if True:
    from dmtjepa.data import open_images
    from dmtjepa.data.sources import shapes
    from tests.data.test_worker_processes import draw_forever

    shapes._write_images = draw_forever
    open_images("shapes:train")
"""


@pytest.mark.slow
def test_processes_that_draw_shapes_end_with_a_killed_parent(tmp_path: Path):
    """They hold the output of the program that started them: its end shows that none of them is left."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DMTJEPA_CACHE": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.read(1) == b"x"
        process.kill()
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
