"""The DALI pipeline from encoded bytes and crop boxes to batches of crops."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dmtjepa.config import DataSettings
from dmtjepa.data.loaders.reader import Sample
from dmtjepa.data.sampling import FLIP_DRAW
from dmtjepa.data.sources.base import DataError

try:
    from nvidia.dali import Pipeline
    from nvidia.dali import fn as _fn
    from nvidia.dali import types as _types
except ImportError as error:  # the extra is not installed
    raise DataError(
        "data.loader is dali, but NVIDIA DALI cannot be imported: pip install 'dmtjepa[dali]', or set data.loader: "
        f"pil ({error})"
    ) from error

fn: Any = _fn  # their type stubs are incomplete
types: Any = _types


class Decoder:
    """A DALI pipeline from encoded bytes and boxes to [B,C,H,W] uint8, C of 3 or 1, `in_flight` batches deep.

    On a GPU, DALI does all of it, and its buffer becomes the tensor. On a CPU, DALI decodes and PyTorch resizes: the
    vectorised uint8 kernel of PyTorch, which torchvision uses too, is four times as fast as DALI's. `dali_resize` makes
    DALI resize there as well.
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
        """Create a new pipeline: a failed one cannot be used again."""
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
            # jpeg_header.py has checked the orientation. Chroma is upsampled as libjpeg does it on the CPU.
            options = {"hw_decoder_load": settings.hw_decoder_load, "jpeg_fancy_upsampling": True} if on_gpu else {}
            images = fn.decoders.image_slice(
                encoded,
                device="mixed" if on_gpu else "cpu",
                start=start,
                shape=shape,
                axes=[0, 1],
                output_type=types.RGB if settings.channels == 3 else types.GRAY,
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

    def feed(self, samples: Sequence[Sample], uniforms: np.ndarray) -> None:
        """Pass on a batch. DALI starts when `in_flight` batches are there."""
        flips = (uniforms[:, FLIP_DRAW] < 0.5) & self._settings.use_horizontal_flip
        self._pipeline.feed_input("encoded", [sample.encoded for sample in samples])
        self._pipeline.feed_input("start", np.array([sample.start for sample in samples], np.int32))
        self._pipeline.feed_input("shape", np.array([sample.shape for sample in samples], np.int32))
        self._pipeline.feed_input("mirror", flips.astype(np.int32))
        self._num_fed += 1
        if self._num_fed >= self._in_flight:  # the first call starts all batches that were fed
            self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The oldest batch, [B,C,H,W] uint8.

        Raises:
            RuntimeError: DALI refused one of its images. Call `build` before the next `feed`.
        """
        if self._device.type == "cuda":
            # Ordered by the stream that reads it, so that DALI reuses the memory only afterwards.
            stream = torch.cuda.current_stream(self._device)
            return torch.from_dlpack(self._pipeline.outputs(cuda_stream=stream)[0].as_tensor())
        if self._resizers is None:
            return torch.from_dlpack(self._pipeline.outputs()[0].as_tensor())
        images, mirror = self._pipeline.outputs()
        flips = mirror.as_array()
        batch = torch.empty(len(images), self._settings.channels, *self._settings.image_size, dtype=torch.uint8)
        list(self._resizers.map(lambda row: _resize(images[row], batch[row], bool(flips[row])), range(len(images))))
        return batch

    def close(self) -> None:
        if self._resizers is not None:
            self._resizers.shutdown()
        del self._pipeline


def _resize(image: Any, out: torch.Tensor, flip: bool) -> None:
    """A DALI image [h,w,C] on the CPU -> out [C,H,W], bilinear with antialiasing."""
    pixels = torch.from_dlpack(image).permute(2, 0, 1)[None]
    if pixels.shape[2:] != out.shape[1:]:
        pixels = F.interpolate(pixels, size=out.shape[1:], mode="bilinear", antialias=True)
    out.copy_(pixels[0].flip(-1) if flip else pixels[0])
