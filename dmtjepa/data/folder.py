"""The torchvision loader: PIL decoding and torchvision's random resized crop, in worker processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment
from dmtjepa.data.broken import BrokenImages
from dmtjepa.data.images import BrokenImage, cut_crop, decode_image, tell_reason
from dmtjepa.data.sampling import FLIP_DRAW, BatchRequest, SampleOrder, candidate_images, choose_crop, draw_uniforms
from dmtjepa.data.sources import DataError, ImageSource

logger = logging.getLogger(__name__)

_POLL_SECONDS = 5  # how often a waiting loader looks whether its workers still move
_PREFETCH = 2  # batches made ahead by each worker


class BatchMaker(Dataset):
    """Turns a BatchRequest into (uint8 [B,3,H,W], [(broken image, reason), ...]); images are None if all is broken."""

    def __init__(self, source: ImageSource, settings: DataSettings, seed: int, num_workers: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        # Of each worker: samples begun, and the image it is at; what tells a stalled worker from a busy one.
        self.progress = torch.zeros(max(1, num_workers), 2, dtype=torch.int64).share_memory_()
        self.closing = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __getitem__(self, request: BatchRequest) -> tuple[torch.Tensor | None, list[tuple[int, str]]]:
        settings = self._settings
        broken: list[tuple[int, str]] = []
        batch = np.empty((len(request.images), *settings.image_size, 3), dtype=np.uint8)
        uniforms = np.stack([draw_uniforms(self._seed, request.epoch, int(p)) for p in request.positions])
        for row, (position, image) in enumerate(zip(request.positions.tolist(), request.images.tolist(), strict=True)):
            picture = self._decode(request.epoch, position, image, broken)
            if picture is None:
                return None, broken
            box = choose_crop(*picture.size, uniforms[row], settings.crop_scale)
            pixels = cut_crop(picture, box, settings.image_size)
            flipped = settings.use_horizontal_flip and uniforms[row, FLIP_DRAW] < 0.5
            batch[row] = pixels[:, ::-1] if flipped else pixels
        images = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
        return augment(images, uniforms, settings), broken

    def _decode(self, epoch: int, position: int, image: int, broken: list[tuple[int, str]]) -> Image.Image | None:
        """The decoded image or, where it is broken, its replacement; None where none of them can be decoded."""
        worker = torch.utils.data.get_worker_info()
        for candidate in candidate_images(image, self._seed, epoch, position, len(self._source)):
            if worker is not None:
                self.progress[worker.id, 1] = candidate
                self.progress[worker.id, 0] += 1
            try:
                return decode_image(self._source.read(candidate))
            except (BrokenImage, OSError) as error:
                broken.append((candidate, tell_reason(error)))
        return None

    def start_worker(self, worker: int) -> None:
        """Leave the signals of a cluster (which reach every process of a job) to the trainer: it ends the workers."""
        closing = self.closing

        def end(number: int, frame: object) -> None:
            if closing.item():
                os._exit(0)

        signal.signal(signal.SIGTERM, end)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


class _Requests(Sampler):
    """The requests of SampleOrder without end: workers need no pause between epochs."""

    def __init__(self, order: SampleOrder, epoch: int, step: int) -> None:
        self._order, self._epoch, self._step = order, epoch, step

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._order.requests(self._epoch, self._step)


class TorchvisionLoader:
    """Batches of random crops, uint8 [B,3,H,W] on the CPU (pinned where asked for), in the order of SampleOrder."""

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
        self._source, self._settings = source, settings
        self._order = SampleOrder(len(source), settings.batch_size, seed, rank, world_size)
        self._maker = BatchMaker(source, settings, seed, settings.num_workers)
        self._broken = BrokenImages(source, settings.max_broken, world_size)
        self._pin_memory = pin_memory
        self._batches: Iterator | None = None
        self._next = (-1, -1)  # epoch and step of the batch that self._batches gives next

    @property
    def num_images(self) -> int:
        return len(self._source)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of each broken image met so far."""
        return self._broken.entries

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """The batches of an epoch from a step on. Skipped steps are not decoded. One epoch runs at a time."""
        if start_step >= self.steps_per_epoch:
            return
        if self._batches is None or self._next != (epoch, start_step):
            self.close()
            self._batches = iter(self._start(epoch, start_step))
        for step in range(start_step, self.steps_per_epoch):
            images, broken = self._receive()
            last = step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, step + 1)
            self._broken.record(self._settings.batch_size, broken)
            if images is None:
                self._broken.stop_lost()
            yield images

    def close(self) -> None:
        """End the workers."""
        self._maker.closing.fill_(1)
        self._batches, self._next = None, (-1, -1)

    def _start(self, epoch: int, step: int) -> DataLoader:
        self._maker.closing.fill_(0)
        num_workers = self._settings.num_workers
        return DataLoader(
            self._maker,
            sampler=_Requests(self._order, epoch, step),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_keep,
            pin_memory=self._pin_memory,
            worker_init_fn=self._maker.start_worker,
            prefetch_factor=_PREFETCH if num_workers else None,
            timeout=_POLL_SECONDS if num_workers else 0,
        )

    def _receive(self) -> tuple[torch.Tensor | None, list[tuple[int, str]]]:
        """The next batch; DataError with the cause when a worker died, or none has moved for worker_timeout seconds."""
        if not self._settings.num_workers:
            return next(self._batches)
        begun, since = -1, time.monotonic()
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    cause = self._tell_death(error)
                    break
            if int(self._maker.progress[:, 0].sum()) != begun:
                begun, since = int(self._maker.progress[:, 0].sum()), time.monotonic()
            elif time.monotonic() - since > self._settings.worker_timeout:
                cause = f"no worker has finished an image for {self._settings.worker_timeout} s (data.worker_timeout)"
                break
        images = sorted({self._source.name(image) for image in self._maker.progress[:, 1].tolist()})
        self._kill_workers()
        raise DataError(f"the data loader stopped: {cause}. The workers were at: {', '.join(images)}")

    def _tell_death(self, error: RuntimeError) -> str:
        """Why a worker died, as far as its exit status tells."""
        for worker in self._batches._workers:
            worker.join(0.1)
        signals = {-worker.exitcode for worker in self._batches._workers if (worker.exitcode or 0) < 0}
        if not signals:
            return str(error)
        names = " and ".join(signal.Signals(number).name for number in sorted(signals))
        memory = ", as by the system when memory runs out (lower data.num_workers)" if signal.SIGKILL in signals else ""
        return f"a worker was ended by {names}{memory}"

    def _kill_workers(self) -> None:
        """A worker that is stuck in a read hears nothing but SIGKILL."""
        for worker in self._batches._workers:
            if worker.is_alive():
                worker.kill()
        self.close()


def _keep(batch: object) -> object:
    return batch
