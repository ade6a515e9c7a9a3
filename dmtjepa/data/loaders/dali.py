"""The DALI loader: the same samples and crops as the torchvision loader's, read and decoded by threads, on the GPU if
there is one.

Which image comes when and how it is cropped is decided here (sampling.py), not by DALI's readers: DALI gets encoded
bytes and crop boxes, and decodes no more of a JPEG than its box. What is not a plain JPEG (jpeg.py) is decoded and
cropped by PIL in the reading threads and handed to DALI as raw pixels, so that odd files look as they do there.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment
from dmtjepa.data.decode import CorruptImage, cut_crop, decode_image, tell_reason
from dmtjepa.data.jpeg_header import read_plain_size
from dmtjepa.data.loaders.base import Loader
from dmtjepa.data.sampling import FLIP_DRAW, BatchRequest, candidate_images, choose_crop, draw_uniforms
from dmtjepa.data.sources.base import DataError, ImageSource

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:  # the extra is not installed
    raise DataError(
        "data.loader is dali, but NVIDIA DALI cannot be imported: pip install 'dmtjepa[dali]', or set data.loader: "
        f"torchvision ({error})"
    ) from error

logger = logging.getLogger(__name__)

_READ_AHEAD = 2  # batches read before DALI asks for them
_IN_FLIGHT = 2  # batches that DALI works on
_POLL_SECONDS = 1


@dataclass
class Sample:
    """What DALI needs of an image: encoded bytes and the crop box in them, (top, left) and (height, width)."""

    image: int
    encoded: np.ndarray
    start: tuple[int, int]
    shape: tuple[int, int]
    by_pil: bool = False  # raw pixels, which PIL decoded


@dataclass
class Batch:
    """A batch on its way: filled by the reading threads, then decoded."""

    request: BatchRequest
    uniforms: np.ndarray  # [B, NUM_DRAWS]
    samples: list[Sample | None]
    corrupt: list[tuple[int, str]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)  # images that DALI would not decode: PIL is the judge of them
    missing: int = 0  # samples not read yet
    lost: bool = False  # no candidate of some place could be read
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Threads that read samples. They are daemons: one that is stuck in a read must not keep the process alive."""

    def __init__(self, source: ImageSource, settings: DataSettings, seed: int, num_threads: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.begun = [0] * num_threads  # samples that each thread began
        self.at: list[int | None] = [None] * num_threads  # the image each thread reads now
        for number in range(num_threads):
            threading.Thread(target=self._work, args=(number,), name=f"read-{number}", daemon=True).start()

    def start(self, request: BatchRequest) -> Batch:
        """Begin to read a batch; `done` of it is set when all is there."""
        uniforms = np.stack([draw_uniforms(self._seed, request.epoch, int(p)) for p in request.positions])
        batch = Batch(request, uniforms, [None] * len(request.images), missing=len(request.images))
        for row in range(len(request.images)):
            self._tasks.put((batch, row))
        return batch

    def read_again(self, batch: Batch, rows: list[int]) -> None:
        """Read some samples of a batch anew, which DALI refused."""
        batch.refused |= {batch.samples[row].image for row in rows}
        batch.missing = len(rows)
        batch.done.clear()
        for row in rows:
            self._tasks.put((batch, row))

    def stop(self) -> None:
        """Let the threads end after what they are at."""
        for _ in self.at:
            self._tasks.put(None)

    def _work(self, number: int) -> None:
        while (task := self._tasks.get()) is not None:
            batch, row = task
            try:
                batch.samples[row] = self._read(number, batch, row)
            except BaseException as error:  # the loader raises it where it can be seen
                batch.error = error
            with self._lock:
                batch.missing -= 1
                if not batch.missing:
                    batch.done.set()

    def _read(self, number: int, batch: Batch, row: int) -> Sample | None:
        position, image = int(batch.request.positions[row]), int(batch.request.images[row])
        scale, size = self._settings.crop_scale, self._settings.image_size
        for candidate in candidate_images(image, self._seed, batch.request.epoch, position, len(self._source)):
            self.begun[number] += 1
            self.at[number] = candidate
            try:
                data = self._source.read(candidate)
                plain = None if candidate in batch.refused else read_plain_size(data)
                if plain is not None:
                    left, top, width, height = choose_crop(*plain, batch.uniforms[row], scale)
                    return Sample(candidate, np.frombuffer(data, np.uint8), (top, left), (height, width))
                picture = decode_image(data)
                box = choose_crop(*picture.size, batch.uniforms[row], scale)
                return _wrap(candidate, cut_crop(picture, box, size))
            except (CorruptImage, OSError) as error:
                with self._lock:
                    batch.corrupt.append((candidate, tell_reason(error)))
            finally:
                self.at[number] = None
        batch.lost = True
        return None


def _wrap(image: int, pixels: np.ndarray) -> Sample:
    """Pixels [H,W,3] as a PPM file, which DALI decodes by copying."""
    height, width, _ = pixels.shape
    header = f"P6\n{width} {height}\n255\n".encode()
    return Sample(image, np.frombuffer(header + pixels.tobytes(), np.uint8), (0, 0), (height, width), by_pil=True)


class Decoder:
    """A DALI pipeline from encoded bytes and boxes to [B,3,H,W] uint8, `in_flight` batches deep.

    On a GPU all of it is DALI's, and its buffer becomes the tensor. On a CPU DALI decodes, and PyTorch resizes: its
    vectorised code for bytes is four times as fast as DALI's, and is what torchvision runs. `dali_resize` keeps
    everything in DALI there too.
    """

    def __init__(
        self, settings: DataSettings, device: torch.device, in_flight: int = 1, dali_resize: bool | None = None
    ) -> None:
        self._settings, self._device, self._in_flight = settings, device, in_flight
        self._dali_resize = device.type == "cuda" if dali_resize is None else dali_resize
        self._num_threads = max(1, settings.num_workers)
        self._resizers = None if self._dali_resize else ThreadPoolExecutor(self._num_threads, "resize")
        self.build()

    def build(self) -> None:
        """A fresh pipeline: a failed one is of no more use."""
        settings, on_gpu = self._settings, self._device.type == "cuda"
        self._num_fed = 0
        self._pipeline = Pipeline(
            batch_size=settings.batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._in_flight,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            # The orientation is settled in jpeg.py; upsampling of colour as libjpeg does it on the CPU.
            options = {"hw_decoder_load": settings.hw_decoder_load, "jpeg_fancy_upsampling": True} if on_gpu else {}
            images = fn.decoders.image_slice(
                encoded,
                device="mixed" if on_gpu else "cpu",
                start=start,
                shape=shape,
                axes=[0, 1],
                output_type=types.RGB,
                adjust_orientation=False,
                **options,
            )
            if self._dali_resize:
                height, width = settings.image_size
                images = fn.resize(images, size=[height, width], interp_type=types.INTERP_LINEAR, antialias=True)
                images = fn.crop_mirror_normalize(images, dtype=types.UINT8, output_layout="CHW", mirror=mirror)
                self._pipeline.set_outputs(images)
            else:
                self._pipeline.set_outputs(images, mirror)
        self._pipeline.build()

    def feed(self, samples: list[Sample], uniforms: np.ndarray) -> None:
        """Hand over a batch; DALI starts when `in_flight` batches are there."""
        flips = (uniforms[:, FLIP_DRAW] < 0.5) & self._settings.use_horizontal_flip
        self._pipeline.feed_input("encoded", [sample.encoded for sample in samples])
        self._pipeline.feed_input("start", np.array([sample.start for sample in samples], np.int32))
        self._pipeline.feed_input("shape", np.array([sample.shape for sample in samples], np.int32))
        self._pipeline.feed_input("mirror", flips.astype(np.int32))
        self._num_fed += 1
        if self._num_fed >= self._in_flight:  # the first call starts all that was fed
            self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The oldest batch, [B,3,H,W] uint8. RuntimeError when DALI refused one of its images; then `build` again."""
        if self._device.type == "cuda":
            # Ordered by the stream that reads it, so that DALI reuses the memory only after that.
            stream = torch.cuda.current_stream(self._device)
            return torch.from_dlpack(self._pipeline.outputs(cuda_stream=stream)[0].as_tensor())
        if self._dali_resize:
            return torch.from_dlpack(self._pipeline.outputs()[0].as_tensor())
        images, mirror = self._pipeline.outputs()
        flips = mirror.as_array()
        batch = torch.empty(len(images), 3, *self._settings.image_size, dtype=torch.uint8)
        list(self._resizers.map(lambda row: _resize(images[row], batch[row], bool(flips[row])), range(len(images))))
        return batch

    def close(self) -> None:
        if self._resizers is not None:
            self._resizers.shutdown()
        self._pipeline = None


def _resize(image: object, out: torch.Tensor, flip: bool) -> None:
    """A DALI image [h,w,3] on the CPU -> out [3,H,W], bilinear with antialiasing."""
    pixels = torch.from_dlpack(image).permute(2, 0, 1)[None]
    if pixels.shape[2:] != out.shape[1:]:
        pixels = F.interpolate(pixels, size=out.shape[1:], mode="bilinear", antialias=True)
    out.copy_(pixels[0].flip(-1) if flip else pixels[0])


class DaliLoader(Loader):
    """Batches on the device."""

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
            Decoder(settings, device).close()  # what cannot work says so now, not in the first epoch
        except RuntimeError as error:
            raise DataError(f"DALI cannot start on {device}, set data.loader: torchvision ({error})") from error
        self._reader: Reader | None = None
        self._decoder: Decoder | None = None

    def _start(self, epoch: int, step: int) -> None:
        self._reader = Reader(self._source, self._settings, self._seed, max(2, self._settings.num_workers))
        self._decoder = Decoder(self._settings, self._device, _IN_FLIGHT)
        self._failed = False
        self._requests = self._order.requests(epoch, step)
        self._reading = deque(self._reader.start(next(self._requests)) for _ in range(_READ_AHEAD))
        self._decoding: deque[Batch] = deque()
        self._decoded: deque[tuple[Batch, torch.Tensor]] = deque()  # what a recovery decoded ahead of its turn
        while len(self._decoding) < _IN_FLIGHT:
            self._feed_next()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._decoder.close()
        self._reader = self._decoder = None

    def _feed_next(self) -> None:
        batch = self._reading.popleft()
        self._reading.append(self._reader.start(next(self._requests)))
        self._wait(batch)
        self._decoding.append(batch)
        self._feed(batch)

    def _feed(self, batch: Batch) -> None:
        try:
            self._decoder.feed(batch.samples, batch.uniforms)
        except RuntimeError:  # an earlier batch has failed in the meantime: _receive sees to it
            self._failed = True

    def _receive(self) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """The next batch. Where DALI refuses an image of those under way, they are decoded again one by one."""
        if not self._decoded:
            try:
                if not self._failed:
                    images = self._decoder.take()
            except RuntimeError as error:
                logger.debug("DALI refused an image: %s", error)
                self._failed = True
            if self._failed:
                self._recover()
            else:
                self._decoded.append((self._decoding.popleft(), images))
        batch, images = self._decoded.popleft()
        if not self._decoded:
            while len(self._decoding) < _IN_FLIGHT:
                self._feed_next()
        return augment(images, batch.uniforms, self._settings), batch.corrupt

    def _recover(self) -> None:
        """Decode the batches under way apart from each other, with PIL as the judge of what DALI refuses.

        What becomes of an image depends on its bytes and its crop box alone, never on what failed before: a resumed
        run gets the same.
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
                        [int(named[1])]
                        if named
                        else self._find_refused(decoder, batch, range(self._settings.batch_size))
                    )
                    if all(batch.samples[row].by_pil for row in refused):  # not for an image's sake
                        raise
                    logger.debug("DALI refused %d images of a batch: %s", len(refused), error)
                    self._reader.read_again(batch, refused)
                    self._wait(batch)
        decoder.close()
        self._decoder.build()
        self._failed = False

    def _find_refused(self, decoder: Decoder, batch: Batch, rows: Sequence[int]) -> list[int]:
        """Those of some rows of a batch that DALI does not decode, by halving."""
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

    def _wait(self, batch: Batch) -> None:
        """Until a batch is read; DataError with the cause when no image has come for worker_timeout seconds.

        They are counted here and not read from a clock, which goes on while a cluster suspends the whole job.
        """
        begun, still = sum(self._reader.begun), 0
        while not batch.done.wait(_POLL_SECONDS):
            still += _POLL_SECONDS
            if sum(self._reader.begun) != begun:
                begun, still = sum(self._reader.begun), 0
            elif still > self._settings.worker_timeout:
                images = sorted({self._source.name(image) for image in self._reader.at if image is not None})
                self.close()
                raise DataError(
                    f"the data loader stopped: no thread has finished an image for {self._settings.worker_timeout} s "
                    f"(data.worker_timeout). The threads were at: {', '.join(images)}"
                )
        if batch.error is not None:
            raise batch.error
        if batch.lost:
            self._corrupt.record(self._settings.batch_size, batch.corrupt)
            self._corrupt.stop_lost()
