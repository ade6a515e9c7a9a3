"""The batches of a rank: images and masks on the device, one step ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dmtjepa.data import Loader
from dmtjepa.masks import MaskBatch
from dmtjepa.training.stopwatch import Event

MicroBatch = tuple[Tensor, MaskBatch]
"""Images uint8 [B,3,H,W] and their masks, on the device."""


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on."""

    step: int  # steps of the run, from 0
    epoch: int
    step_in_epoch: int
    micro_batches: list[MicroBatch]  # as many as are accumulated
    data_ready: Event  # when the device had all of them


class BatchStream:
    """Fetches the batches of a rank in order and one step ahead. A thread of the host samples the masks.

    On CUDA, copies run on a stream of their own: a batch that is fetched while the device computes is there in time.

    Args:
        loader: yields the images of a micro-batch at a time.
        sample_masks: (step, number of the micro-batch in the step) -> masks on the host.
        record_event: `Stopwatch.record_event`.
        device: where batches go.
        steps_per_epoch: optimizer steps of an epoch.
        accumulation: micro-batches of a step.
    """

    def __init__(
        self,
        loader: Loader,
        sample_masks: Callable[[int, int], MaskBatch],
        record_event: Callable[[], Event],
        device: torch.device,
        *,
        steps_per_epoch: int,
        accumulation: int,
    ) -> None:
        self._loader, self._sample_masks, self._record_event = loader, sample_masks, record_event
        self._device, self._steps_per_epoch, self._accumulation = device, steps_per_epoch, accumulation
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._batches: Iterator[StepBatch] = iter(())
        self._next: StepBatch | None = None

    def steps(self, first: int, end: int) -> Iterator[StepBatch]:
        """The batches of the steps from `first` up to but not including `end`."""
        self._batches, self._next = self._make_batches(first, end), None
        while True:
            self.fetch()
            if self._next is None:
                return
            batch, self._next = self._next, None
            yield batch

    def fetch(self) -> None:
        """Fetch the batch of the next step, if it is not there yet.

        Call this after the device got the work of a step and before the host waits for the device.
        """
        if self._next is None:
            self._next = next(self._batches, None)

    def close(self) -> None:
        """End the thread that samples masks."""
        self._thread.shutdown(cancel_futures=True)

    def _make_batches(self, first: int, end: int) -> Iterator[StepBatch]:
        masks = self._start_sampling(first) if first < end else []
        images: Iterator[Tensor] = iter(())
        for step in range(first, end):
            epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
            if step == first or step_in_epoch == 0:
                images = self._loader.epoch(epoch, step_in_epoch * self._accumulation)
            current = masks
            if step + 1 < end:
                masks = self._start_sampling(step + 1)
            micro_batches = [self._to_device(next(images), future.result()) for future in current]
            yield StepBatch(step, epoch, step_in_epoch, micro_batches, self._record_event())

    def _start_sampling(self, step: int) -> list[Future[MaskBatch]]:
        return [self._thread.submit(self._sample_masks, step, number) for number in range(self._accumulation)]

    def _to_device(self, images: Tensor, masks: MaskBatch) -> MicroBatch:
        if self._copies is None:
            return images, masks
        with torch.cuda.stream(self._copies):
            images = images.to(self._device, non_blocking=True)
            masks = masks.pin_memory().to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        images.record_stream(current)
        masks.record_stream(current)
        return images, masks
