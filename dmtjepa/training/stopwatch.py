"""Times on the device's own clock, taken without making the host wait for the device."""

from __future__ import annotations

import time
from typing import TypeAlias, cast

import torch

Event: TypeAlias = "torch.cuda.Event | float"
"""A moment: a CUDA event, or seconds on the host's clock where training runs on a CPU."""


class Stopwatch:
    """Records moments at once and measures the time between them after the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def record_event(self) -> Event:
        """The moment at which the device reaches the work that is enqueued next."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Event, end: Event) -> float:
        """Seconds between two moments that have passed."""
        if self._on_cuda:
            return cast(torch.cuda.Event, start).elapsed_time(cast(torch.cuda.Event, end)) / 1000
        return cast(float, end) - cast(float, start)
