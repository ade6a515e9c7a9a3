"""Threads that read encoded images for the DALI loader and draw their crop boxes.

Images that are not plain JPEGs (jpeg_header.py) are decoded and cropped by PIL here, and passed on as raw pixels. So
unusual files look the same with both loaders.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

import numpy as np

from dmtjepa.config import DataSettings
from dmtjepa.data.crop import crop_and_resize
from dmtjepa.data.decode import CorruptImage, decode_image, tell_reason
from dmtjepa.data.jpeg_header import read_plain_size
from dmtjepa.data.sampling import BatchRequest, candidate_images, choose_crop, draw_uniforms
from dmtjepa.data.sources.base import ImageSource


@dataclass
class Sample:
    """What DALI needs of an image: encoded bytes and the crop box in them, (top, left) and (height, width)."""

    image: int
    encoded: np.ndarray
    start: tuple[int, int]
    shape: tuple[int, int]
    by_pil: bool = False  # raw pixels, decoded by PIL


_NOT_READ = Sample(-1, np.empty(0, np.uint8), (0, 0), (0, 0))


@dataclass
class PendingBatch:
    """A batch that the threads fill with samples."""

    request: BatchRequest
    uniforms: np.ndarray  # [B, NUM_DRAWS]
    samples: list[Sample]
    corrupt: list[tuple[int, str]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)  # images that DALI could not decode; PIL decides about them
    num_missing: int = 0  # samples that are not read yet
    no_candidate: bool = False  # some place has no readable candidate
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Reads samples with threads. They are daemons, because one that is stuck must not keep the process alive."""

    def __init__(self, source: ImageSource, settings: DataSettings, seed: int, num_threads: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        self._tasks: queue.SimpleQueue[tuple[PendingBatch, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_started = [0] * num_threads  # images that each thread has started to read
        self.current: list[int | None] = [None] * num_threads  # the image that each thread is reading
        for thread in range(num_threads):
            threading.Thread(target=self._work, args=(thread,), name=f"read-{thread}", daemon=True).start()

    @property
    def num_started(self) -> int:
        """How many images the threads have started to read."""
        return sum(self._num_started)

    def start(self, request: BatchRequest) -> PendingBatch:
        """Start reading a batch. Its `done` is set when all samples are there."""
        uniforms = np.stack([draw_uniforms(self._seed, request.epoch, int(p)) for p in request.positions])
        batch = PendingBatch(request, uniforms, [_NOT_READ] * len(request.images), num_missing=len(request.images))
        for row in range(len(request.images)):
            self._tasks.put((batch, row))
        return batch

    def read_again(self, batch: PendingBatch, rows: list[int]) -> None:
        """Start reading again the samples of a batch that DALI refused."""
        batch.refused |= {batch.samples[row].image for row in rows}
        batch.num_missing = len(rows)
        batch.done.clear()
        for row in rows:
            self._tasks.put((batch, row))

    def stop(self) -> None:
        """Let the threads end after their current image."""
        for _ in self.current:
            self._tasks.put(None)

    def _work(self, thread: int) -> None:
        while (task := self._tasks.get()) is not None:
            batch, row = task
            try:
                sample = self._read(thread, batch, row)
                if sample is None:
                    batch.no_candidate = True
                else:
                    batch.samples[row] = sample
            except BaseException as error:  # the loader raises it in the main thread
                batch.error = error
            with self._lock:
                batch.num_missing -= 1
                if not batch.num_missing:
                    batch.done.set()

    def _read(self, thread: int, batch: PendingBatch, row: int) -> Sample | None:
        """The sample in a row of a batch; None if no candidate can be read."""
        position, image = int(batch.request.positions[row]), int(batch.request.images[row])
        scale, size = self._settings.crop_scale, self._settings.image_size
        for candidate in candidate_images(image, self._seed, batch.request.epoch, position, len(self._source)):
            self._num_started[thread] += 1
            self.current[thread] = candidate
            try:
                data = self._source.read(candidate)
                plain = None if candidate in batch.refused else read_plain_size(data)
                if plain is not None and plain[0] * plain[1] <= self._settings.max_megapixels * 1e6:
                    left, top, width, height = choose_crop(*plain, batch.uniforms[row], scale)
                    return Sample(candidate, np.frombuffer(data, np.uint8), (top, left), (height, width))
                decoded = decode_image(
                    data, self._settings.max_megapixels, self._settings.channels, self._settings.max_value
                )
                box = choose_crop(*decoded.size, batch.uniforms[row], scale)
                return _wrap(candidate, crop_and_resize(decoded, box, size))
            except (CorruptImage, OSError) as error:
                with self._lock:
                    batch.corrupt.append((candidate, tell_reason(error)))
            finally:
                self.current[thread] = None
        return None


def _wrap(image: int, pixels: np.ndarray) -> Sample:
    """Pixels [H,W,3] as a PPM file, or [H,W,1] as a PGM file, which DALI decodes by copying."""
    height, width, channels = pixels.shape
    header = f"{'P6' if channels == 3 else 'P5'}\n{width} {height}\n255\n".encode()
    return Sample(image, np.frombuffer(header + pixels.tobytes(), np.uint8), (0, 0), (height, width), by_pil=True)
