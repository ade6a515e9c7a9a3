"""The torchvision loader: PIL decoding and torchvision's random resized crop, in worker processes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment
from dmtjepa.data.decode import CorruptImage, cut_crop, decode_image, tell_reason
from dmtjepa.data.loaders.base import Loader, start_workers
from dmtjepa.data.sampling import FLIP_DRAW, BatchRequest, SampleOrder, candidate_images, choose_crop, draw_uniforms
from dmtjepa.data.sources.base import DataError, ImageSource
from dmtjepa.processes import enter_worker

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1  # how often a waiting loader looks whether its workers still move
_PREFETCH = 2  # batches made ahead by each worker


class BatchMaker(Dataset):
    """Turns a BatchRequest into (uint8 [B,3,H,W], [(corrupt image, reason), ...]).

    In place of the images there is None where all is corrupt, or a DataError.
    """

    def __init__(self, source: ImageSource, settings: DataSettings, seed: int, num_workers: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        # Of each worker: samples begun, and the image it is at; what tells a stalled worker from a busy one.
        self.progress = torch.zeros(max(1, num_workers), 2, dtype=torch.int64).share_memory_()
        self.closing = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._parent = os.getpid()

    def __getitem__(self, request: BatchRequest) -> tuple[torch.Tensor | DataError | None, list[tuple[int, str]]]:
        settings = self._settings
        corrupt: list[tuple[int, str]] = []
        batch = np.empty((len(request.images), 3, *settings.image_size), dtype=np.uint8)
        uniforms = np.stack([draw_uniforms(self._seed, request.epoch, int(p)) for p in request.positions])
        for row, (position, image) in enumerate(zip(request.positions.tolist(), request.images.tolist(), strict=True)):
            picture = self._decode(request.epoch, position, image, corrupt)
            if picture is None:
                return None, corrupt
            box = choose_crop(*picture.size, uniforms[row], settings.crop_scale)
            pixels = cut_crop(picture, box, settings.image_size)
            flipped = settings.use_horizontal_flip and uniforms[row, FLIP_DRAW] < 0.5
            batch[row] = (pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1)
        images = augment(torch.from_numpy(batch), uniforms, settings)
        if torch.utils.data.get_worker_info() is None:
            return images, corrupt
        try:  # here, because the queue would drop a batch that it finds no memory for
            return images.share_memory_(), corrupt
        except RuntimeError as error:
            size = images.numel() / 1e6
            return DataError(
                f"no shared memory for a batch of {size:.1f} MB ({error}). Give /dev/shm more room (docker run "
                f"--shm-size=16g), lower data.num_workers, or set data.loader: dali, which needs none"
            ), corrupt

    def _decode(self, epoch: int, position: int, image: int, corrupt: list[tuple[int, str]]) -> Image.Image | None:
        """The decoded image or, where it is corrupt, its replacement; None where none of them can be decoded."""
        worker = torch.utils.data.get_worker_info()
        for candidate in candidate_images(image, self._seed, epoch, position, len(self._source)):
            if worker is not None:
                self.progress[worker.id, 1] = candidate
                self.progress[worker.id, 0] += 1
            try:
                return decode_image(self._source.read(candidate))
            except (CorruptImage, OSError) as error:
                corrupt.append((candidate, tell_reason(error)))
        return None

    def start_worker(self, worker: int) -> None:
        """Leave the signals of a cluster (which reach every process of a job) to the trainer: it ends the workers."""
        closing = self.closing

        def end(number: int, frame: object) -> None:
            if closing.item():
                os._exit(0)

        signal.signal(signal.SIGTERM, end)
        enter_worker(self._parent)


class _Requests(Sampler):
    """The requests of SampleOrder without end: workers need no pause between epochs."""

    def __init__(self, order: SampleOrder, epoch: int, step: int) -> None:
        self._order, self._epoch, self._step = order, epoch, step

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._order.requests(self._epoch, self._step)


class TorchvisionLoader(Loader):
    """Batches on the CPU, pinned where asked for."""

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
        # A process that ends without `close`, as by an error, waits for its workers: they must obey then.
        weakref.finalize(self, self._maker.closing.fill_, 1)
        self._batches: Iterator | None = None

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
        images, corrupt = self._watch_next() if self._settings.num_workers else next(self._batches)
        if isinstance(images, DataError):
            raise images
        return images, corrupt

    def _watch_next(self) -> tuple[torch.Tensor | DataError | None, list[tuple[int, str]]]:
        """The next batch; DataError with the cause when a worker died, or none has moved for worker_timeout seconds."""
        received, stalled = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, args=(received, stalled), name="watch workers", daemon=True).start()
        try:
            return next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            cause = self._tell_stall() if stalled.is_set() else self._tell_death(error)
            if cause is None:
                raise
            images = sorted({self._source.name(image) for image in self._maker.progress[:, 1].tolist()})
        finally:
            received.set()
        self._kill_workers()
        self.close()
        raise DataError(f"the data loader stopped: {cause}. The workers were at: {', '.join(images)}")

    def _watch(self, received: threading.Event, stalled: threading.Event) -> None:
        """Kill the workers when none has moved for worker_timeout seconds, which ends the wait for their batch.

        In a thread, because no timeout ends every wait: to take a batch over, this process asks the worker that made it
        for the memory, and a worker that was stopped never answers. Time is counted here and not read from a clock,
        which goes on while a cluster suspends the whole job.
        """
        begun, still = int(self._maker.progress[:, 0].sum()), 0
        while not received.wait(_POLL_SECONDS):
            still += _POLL_SECONDS
            if int(self._maker.progress[:, 0].sum()) != begun:
                begun, still = int(self._maker.progress[:, 0].sum()), 0
            elif still > self._settings.worker_timeout:
                if all(worker.is_alive() for worker in self._batches._workers):  # else DataLoader tells of the death
                    stalled.set()
                    self._kill_workers()
                return

    def _tell_stall(self) -> str:
        return f"no worker has finished an image for {self._settings.worker_timeout:g} s (data.worker_timeout)"

    def _tell_death(self, error: Exception) -> str | None:
        """Why a worker died, as far as its exit status tells; None where all live."""
        for worker in self._batches._workers:
            worker.join(0.1)
        codes = {worker.exitcode for worker in self._batches._workers} - {None}
        signals = sorted(-code for code in codes if code < 0)
        if not signals:
            return str(error) if codes else None
        names = " and ".join(signal.Signals(number).name for number in signals)
        memory = ", as by the system when memory runs out (lower data.num_workers)" if signal.SIGKILL in signals else ""
        return f"a worker was ended by {names}{memory}"

    def _kill_workers(self) -> None:
        """A worker that is stuck in a read, or stopped, hears nothing but SIGKILL."""
        for worker in self._batches._workers:
            if worker.is_alive():
                worker.kill()


def _keep(batch: object) -> object:
    return batch
