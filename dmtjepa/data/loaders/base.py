"""What the two loaders share: the order of samples, resuming, and the account of corrupt images."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from dmtjepa.config import DataSettings
from dmtjepa.data.corrupt import CorruptImages
from dmtjepa.data.sampling import SampleOrder
from dmtjepa.data.sources.base import ImageSource


class Loader(ABC):
    """Batches of random crops, uint8 [B,3,H,W], in the order of SampleOrder."""

    def __init__(
        self, source: ImageSource, settings: DataSettings, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        self._order = SampleOrder(len(source), settings.batch_size, seed, rank, world_size)
        self._corrupt = CorruptImages(source, settings.max_broken, world_size)
        self._next: tuple[int, int] | None = None  # epoch and step of the batch that comes next, once one has come

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
        """The batches of an epoch from a step on. Skipped steps are not decoded. One epoch runs at a time."""
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
                self._corrupt.stop_lost()
            yield images

    def close(self) -> None:
        """End what works ahead."""
        self._stop()
        self._next = None

    @abstractmethod
    def _start(self, epoch: int, step: int) -> None:
        """Begin to work ahead from a step on, epoch after epoch."""

    @abstractmethod
    def _receive(self) -> tuple[torch.Tensor | None, list[tuple[int, str]]]:
        """The next batch, None where all candidates for a place of it are corrupt; [(corrupt image, reason), ...]."""

    @abstractmethod
    def _stop(self) -> None:
        """End what `_start` began, if it did."""


def start_workers(loader: DataLoader) -> Iterator:
    """`iter(loader)` without the SIGCHLD handler that DataLoader installs in this process.

    That handler raises the death of a worker in the middle of whatever the process is doing.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
    return batches
