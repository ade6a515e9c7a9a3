"""The DALI loader: the same samples and crops as with the loader `pil`, decoded by DALI, on the GPU if there is one.

The order of images and their crop boxes come from sampling.py and not from DALI's readers. DALI gets encoded bytes and
boxes, and decodes no more of a JPEG than its box.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence

import torch

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment
from dmtjepa.data.loaders.base import Loader, wait_for_progress
from dmtjepa.data.loaders.dali_pipeline import Decoder
from dmtjepa.data.loaders.reader import PendingBatch, Reader
from dmtjepa.data.sources.base import DataError, ImageSource

logger = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches that are read before DALI needs them
_IN_FLIGHT = 2  # batches that DALI decodes


class DaliLoader(Loader):
    """Batches on the device."""

    name = "dali"

    def __init__(
        self,
        source: ImageSource,
        settings: DataSettings,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(source, settings, seed=seed, rank=rank, world_size=world_size)
        self._device = device
        try:
            Decoder(settings, device).close()  # fail now, not in the first epoch
        except RuntimeError as error:
            raise DataError(f"DALI cannot start on {device}, set data.loader: pil ({error})") from error
        self._running = False  # whether there are a reader and a decoder

    def _start(self, epoch: int, step: int) -> None:
        self._reader = Reader(self._source, self._settings, self._seed, max(2, self._settings.num_workers))
        self._decoder = Decoder(self._settings, self._device, _IN_FLIGHT)
        self._running, self._failed = True, False
        self._requests = self._order.requests(epoch, step)
        self._reading = deque(self._reader.start(next(self._requests)) for _ in range(_READ_AHEAD))
        self._decoding: deque[PendingBatch] = deque()
        self._decoded: deque[tuple[PendingBatch, torch.Tensor]] = deque()  # more than one only after a recovery
        while len(self._decoding) < _IN_FLIGHT:
            self._feed_next()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            self._reader.stop()
            self._decoder.close()
            del self._reader, self._decoder

    def _feed_next(self) -> None:
        batch = self._reading.popleft()
        self._reading.append(self._reader.start(next(self._requests)))
        self._wait(batch)
        self._decoding.append(batch)
        try:
            self._decoder.feed(batch.samples, batch.uniforms)
        except RuntimeError:  # an earlier batch has failed: `_receive` recovers
            self._failed = True

    def _receive(self) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """The next batch. If DALI refuses an image of the batches in flight, they are decoded again one by one."""
        if not self._decoded:
            try:
                if not self._failed:
                    images = self._decoder.take()
                    self._decoded.append((self._decoding.popleft(), images))
            except RuntimeError as error:
                logger.debug("DALI refused an image: %s", error)
                self._failed = True
            if self._failed:
                self._recover()
        batch, images = self._decoded.popleft()
        if not self._decoded:
            while len(self._decoding) < _IN_FLIGHT:
                self._feed_next()
        return augment(images, batch.uniforms, self._settings), batch.corrupt

    def _recover(self) -> None:
        """Decode the batches in flight separately. PIL decides about the images that DALI refuses.

        The result for an image depends only on its bytes and its crop box, never on earlier failures, so that a resumed
        run gets the same pixels.
        """
        decoder = Decoder(self._settings, self._device)
        while self._decoding:
            batch = self._decoding.popleft()
            while True:
                try:
                    decoder.feed(batch.samples, batch.uniforms)
                    self._decoded.append((batch, decoder.take()))
                    break
                except RuntimeError as error:
                    decoder.build()
                    named = re.search(r"Failed to decode sample #(\d+)", str(error))
                    refused = (
                        [int(named[1])] if named else self._find_refused(decoder, batch, range(len(batch.samples)))
                    )
                    if all(batch.samples[row].by_pil for row in refused):  # so the cause is not an image
                        raise
                    logger.debug("DALI refused %d images of a batch: %s", len(refused), error)
                    self._reader.read_again(batch, refused)
                    self._wait(batch)
        decoder.close()
        self._decoder.build()
        self._failed = False

    def _find_refused(self, decoder: Decoder, batch: PendingBatch, rows: Sequence[int]) -> list[int]:
        """Which of some consecutive rows of a batch DALI does not decode, by bisection."""
        try:
            decoder.feed([batch.samples[row] for row in rows], batch.uniforms[rows[0] : rows[-1] + 1])
            decoder.take()
            return []
        except RuntimeError:
            decoder.build()
        if len(rows) == 1:
            return list(rows)
        middle = len(rows) // 2
        return [
            *self._find_refused(decoder, batch, rows[:middle]),
            *self._find_refused(decoder, batch, rows[middle:]),
        ]

    def _wait(self, batch: PendingBatch) -> None:
        """Wait until a batch is read; DataError with the cause when no image has come for worker_timeout seconds."""
        reader = self._reader
        if not wait_for_progress(batch.done, lambda: reader.num_started, self._settings.worker_timeout):
            images = sorted({self._source.name(image) for image in reader.current if image is not None})
            self.close()
            raise DataError(
                f"the data loader stopped: no thread has finished an image for {self._settings.worker_timeout:g} s "
                f"(data.worker_timeout). The threads were reading: {', '.join(images)}"
            )
        if batch.error is not None:
            raise batch.error
        if batch.no_candidate:
            self._corrupt.record(self._settings.batch_size, batch.corrupt)
            self._corrupt.stop_without_replacement()
