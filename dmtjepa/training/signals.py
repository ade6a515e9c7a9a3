"""Signals that ask a run to save and stop."""

from __future__ import annotations

import multiprocessing
import signal
import time
from types import FrameType
from typing import Any

from dmtjepa.processes import STOP_SIGNALS

# A Ctrl-C that follows another one sooner is the same one. It reaches a process of torchrun twice: from the terminal
# and from torchrun.
SAME_SECONDS = 1.0
REQUEUE_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""What a cluster sends before it ends a job that is requeued. They leave little time."""


class StopSignals:
    """While entered, stop signals are recorded instead of obeyed. A second Ctrl-C is obeyed at once, see `end_by`.

    Signals that were ignored before, as SIGHUP is under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._interrupted: float | None = None  # when the first Ctrl-C came
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def in_haste(self) -> bool:
        """Whether a cluster is about to end the job, which the next start continues."""
        return not REQUEUE_SIGNALS.isdisjoint(self.received)

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        # The process that started this one, if it did (`launch`), looks after a second Ctrl-C.
        if number == signal.SIGINT and multiprocessing.parent_process() is None:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > SAME_SECONDS:
                self._end(number)
        self.received.append(number)

    def _end(self, number: int) -> None:
        signal.signal(number, self._previous[signal.Signals(number)])
        end_by(number)


def end_by(number: int) -> None:
    """Give a signal to its handler. Ctrl-C ends the process if its handler is Python's own: no KeyboardInterrupt."""
    if signal.getsignal(number) is signal.default_int_handler:
        signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
