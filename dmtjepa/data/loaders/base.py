"""What the training loaders share: the order of samples, resuming, corrupt images, and the watch on their workers."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dmtjepa.config import DataSettings
from dmtjepa.data.corrupt import CorruptImages
from dmtjepa.data.sampling import SampleOrder
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.processes import shorten_socket_names

_POLL_SECONDS = 1  # how often a waiting loader checks that its workers make progress


class Loader(ABC):
    """Batches of random crops, uint8 [B,C,H,W], in the order of SampleOrder."""

    name: str  # in data.loader

    def __init__(
        self, source: ImageSource, settings: DataSettings, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        self._order = SampleOrder(len(source), settings.batch_size, seed, rank, world_size)
        self._corrupt = CorruptImages(source, settings.max_broken, world_size)
        self._next: tuple[int, int] | None = None  # epoch and step of the next batch, once `_start` was called

    @property
    def num_images(self) -> int:
        return len(self._source)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def corrupt(self) -> list[tuple[str, str]]:
        """(name, reason) of each corrupt image met so far."""
        return self._corrupt.entries

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """The batches of an epoch from a step on. Skipped steps are not decoded. Iterate over one epoch at a time.

        Raises:
            DataError: too many images are corrupt, or the workers died or stalled.
        """
        if start_step >= self.steps_per_epoch:
            return
        if self._next != (epoch, start_step):
            self.close()
            self._start(epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            images, corrupt = self._receive()
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            self._corrupt.record(self._settings.batch_size, corrupt)
            if images is None:
                self._corrupt.stop_without_replacement()
            yield images

    def close(self) -> None:
        """Stop loading ahead."""
        self._stop()
        self._next = None

    @abstractmethod
    def _start(self, epoch: int, step: int) -> None:
        """Start loading ahead from a step on, epoch after epoch."""

    @abstractmethod
    def _receive(self) -> tuple[torch.Tensor | None, list[tuple[int, str]]]:
        """The next batch and its [(corrupt image, reason), ...]; no batch where a place has no readable candidate."""

    @abstractmethod
    def _stop(self) -> None:
        """Stop what `_start` started, if it was called."""


def wait_for_progress(done: threading.Event, count_progress: Callable[[], int], timeout: float) -> bool:
    """Wait until `done` is set. Returns False when `count_progress()` has not changed for `timeout` seconds.

    The seconds are counted and not read from a clock, because a clock goes on while a cluster suspends the whole job.
    """
    progress, seconds = count_progress(), 0
    while not done.wait(_POLL_SECONDS):
        seconds += _POLL_SECONDS
        if count_progress() != progress:
            progress, seconds = count_progress(), 0
        elif seconds > timeout:
            return False
    return True


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)` without the SIGCHLD handler that DataLoader installs in this process.

    That handler raises the death of a worker in the middle of whatever the process is doing.
    """
    shorten_socket_names()
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
    return batches
