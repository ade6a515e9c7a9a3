"""The loader `pil`: PIL decoding and torchvision's random resized crop, in worker processes."""

from __future__ import annotations

import errno
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment
from dmtjepa.data.crop import crop_and_resize
from dmtjepa.data.decode import CorruptImage, Picture, decode_image, tell_reason
from dmtjepa.data.loaders.base import Loader, start_workers, wait_for_progress
from dmtjepa.data.resources import check_resources
from dmtjepa.data.sampling import FLIP_DRAW, BatchRequest, SampleOrder, candidate_images, choose_crop, draw_uniforms
from dmtjepa.data.sources.base import DataError, ImageSource
from dmtjepa.processes import enter_worker

_PREFETCH = 2  # batches that each worker loads ahead


class BatchMaker(Dataset[Any]):
    """Turns a BatchRequest into (uint8 [B,C,H,W], [(corrupt image, reason), ...]).

    Instead of the images there is None where a place has no readable candidate, or a DataError.
    """

    def __init__(self, source: ImageSource, settings: DataSettings, seed: int, num_workers: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        # Of each worker: how many images it has started, and the current one. Tells a stalled worker from a slow one.
        self.progress = torch.zeros(max(1, num_workers), 2, dtype=torch.int64).share_memory_()
        self.closing = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._parent = os.getpid()

    def __getitem__(self, request: BatchRequest) -> tuple[torch.Tensor | DataError | None, list[tuple[int, str]]]:
        corrupt: list[tuple[int, str]] = []
        try:  # an error that a worker raises would reach the trainer as a traceback
            try:
                return self._make(request, corrupt), corrupt
            except MemoryError as error:
                check_resources(error)
                raise
        except DataError as error:
            return error, corrupt

    def _make(self, request: BatchRequest, corrupt: list[tuple[int, str]]) -> torch.Tensor | None:
        settings = self._settings
        batch = np.empty((len(request.images), settings.channels, *settings.image_size), dtype=np.uint8)
        uniforms = np.stack([draw_uniforms(self._seed, request.epoch, int(p)) for p in request.positions])
        for row, (position, number) in enumerate(zip(request.positions.tolist(), request.images.tolist(), strict=True)):
            image = self._decode(request.epoch, position, number, corrupt)
            if image is None:
                return None
            box = choose_crop(*image.size, uniforms[row], settings.crop_scale)
            pixels = crop_and_resize(image, box, settings.image_size)
            flipped = settings.use_horizontal_flip and uniforms[row, FLIP_DRAW] < 0.5
            batch[row] = (pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1)
        images = augment(torch.from_numpy(batch), uniforms, settings)
        if torch.utils.data.get_worker_info() is None:
            return images
        try:  # here, because the queue drops a batch silently when there is no memory for it
            return images.share_memory_()
        except RuntimeError as error:
            if "Too many open files" in str(error):
                check_resources(error)
            size = images.numel() / 1e6
            raise DataError(
                f"no shared memory for a batch of {size:.1f} MB ({error}). Give /dev/shm more room (docker run "
                f"--shm-size=16g), lower data.num_workers, or set data.loader: dali, which needs none"
            ) from error

    def _decode(self, epoch: int, position: int, image: int, corrupt: list[tuple[int, str]]) -> Picture | None:
        """The decoded image or, if it is corrupt, its replacement; None if no candidate can be decoded."""
        worker = torch.utils.data.get_worker_info()
        for candidate in candidate_images(image, self._seed, epoch, position, len(self._source)):
            if worker is not None:
                self.progress[worker.id, 1] = candidate
                self.progress[worker.id, 0] += 1
            try:
                return decode_image(
                    self._source.read(candidate),
                    self._settings.max_megapixels,
                    self._settings.channels,
                    self._settings.max_value,
                )
            except (CorruptImage, OSError) as error:
                corrupt.append((candidate, tell_reason(error)))
        return None

    def start_worker(self, worker: int) -> None:
        """Ignore the signals that a cluster sends to every process of a job: the trainer handles them."""
        closing = self.closing

        def end(number: int, frame: object) -> None:
            if closing.item():
                os._exit(0)

        signal.signal(signal.SIGTERM, end)
        enter_worker(self._parent)


class _Requests(Sampler[Any]):
    """The requests of SampleOrder without end: the workers do not stop between epochs."""

    def __init__(self, order: SampleOrder, epoch: int, step: int) -> None:
        self._order, self._epoch, self._step = order, epoch, step

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._order.requests(self._epoch, self._step)


class PilLoader(Loader):
    """Batches in the memory of the CPU, pinned if asked for."""

    name = "pil"

    def __init__(
        self,
        source: ImageSource,
        settings: DataSettings,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(source, settings, seed=seed, rank=rank, world_size=world_size)
        self._maker = BatchMaker(source, settings, seed, settings.num_workers)
        self._pin_memory = pin_memory
        # A process that ends without `close`, as after an error, waits for its workers: now they must obey SIGTERM.
        weakref.finalize(self, self._maker.closing.fill_, 1)
        self._batches: Any = None  # the iterator of DataLoader, whose workers are private

    def _start(self, epoch: int, step: int) -> None:
        self._maker.closing.fill_(0)
        num_workers = self._settings.num_workers
        loader = DataLoader(
            self._maker,
            sampler=_Requests(self._order, epoch, step),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_keep,
            pin_memory=self._pin_memory,
            worker_init_fn=self._maker.start_worker,
            prefetch_factor=_PREFETCH if num_workers else None,
        )
        self._batches = start_workers(loader)  # `_receive` reports the death of a worker

    def _stop(self) -> None:
        self._maker.closing.fill_(1)
        self._batches = None

    def _receive(self) -> tuple[torch.Tensor | None, list[tuple[int, str]]]:
        images, corrupt = self._receive_watched() if self._settings.num_workers else next(self._batches)
        if isinstance(images, DataError):
            raise images
        return images, corrupt

    def _receive_watched(self) -> tuple[torch.Tensor | DataError | None, list[tuple[int, str]]]:
        """The next batch; DataError with the cause when a worker died or all stalled for worker_timeout seconds."""
        received, stalled = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, args=(received, stalled), name="watch workers", daemon=True).start()
        try:
            return next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            cause = self._describe_stall() if stalled.is_set() else self._describe_death(error)
            if cause is None:
                check_resources(error)
                if isinstance(error, EOFError):  # the thread of a worker that passes on memory ended: it needs a file
                    check_resources(OSError(errno.EMFILE, "a worker cannot pass on its batch"))
                raise
            images = sorted({self._source.name(image) for image in self._maker.progress[:, 1].tolist()})
        finally:
            received.set()
        self._kill_workers()
        self.close()
        raise DataError(f"the data loader stopped: {cause}. The workers were reading: {', '.join(images)}")

    def _watch(self, received: threading.Event, stalled: threading.Event) -> None:
        """Kill the workers when all have stalled for worker_timeout seconds, which ends the wait for their batch.

        This needs a thread, because no timeout ends every wait: to receive a batch, this process asks the worker that
        made it for the memory, and a stopped worker never answers.
        """
        if not wait_for_progress(
            received, lambda: int(self._maker.progress[:, 0].sum()), self._settings.worker_timeout
        ) and all(worker.is_alive() for worker in self._batches._workers):  # DataLoader reports a dead worker itself
            stalled.set()
            self._kill_workers()

    def _describe_stall(self) -> str:
        return f"no worker has finished an image for {self._settings.worker_timeout:g} s (data.worker_timeout)"

    def _describe_death(self, error: Exception) -> str | None:
        """Why a worker died, as far as its exit status tells; None if all are alive."""
        for worker in self._batches._workers:
            worker.join(0.1)
        codes = {worker.exitcode for worker in self._batches._workers} - {None}
        signals = sorted(-code for code in codes if code < 0)
        if not signals:
            return str(error) if codes else None
        names = " and ".join(signal.Signals(number).name for number in signals)
        memory = ", as when the system runs out of memory (lower data.num_workers)" if signal.SIGKILL in signals else ""
        return f"a worker was ended by {names}{memory}"

    def _kill_workers(self) -> None:
        """SIGKILL, because a worker that is stuck in a read, or stopped, does not react to anything else."""
        for worker in self._batches._workers:
            if worker.is_alive():
                worker.kill()


def _keep(batch: object) -> object:
    return batch
