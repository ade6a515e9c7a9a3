"""Ends a process that makes no progress: with a report of where each rank stands, or of the rank that failed."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
from typing import Any

from dmtjepa.training.distributed import World, find_failure
from dmtjepa.training.phase import Phase

EXIT_HUNG = 70
EXIT_FAILED = 1
# What a rank is given after the failure of another one to end by itself. One that waits for its GPU cannot.
FAILURE_SECONDS = 30.0
_LOOKS = 3  # intervals between the two looks at the other ranks before the process ends


class Watchdog:
    """Reports where each rank stands, and ends the process, after `timeout` seconds without progress.

    A thread on each rank writes the phase and step of that rank into the store every few seconds. A collective that
    hangs, hangs on all ranks: the report shows which of them is in another phase, or has not been heard from.

    After the failure of another rank (`first_failure`), FAILURE_SECONDS without progress are enough.

    The thread counts the intervals that it has waited and reads no clock. Clocks jump, and they go on while a job is
    suspended (SIGSTOP, a laptop, a virtual machine), when no rank can make progress.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._interval = min(5.0, timeout / 8)
        # Waiting in a TCPStore blocks its connection: the thread has its own.
        store: Any = world.store  # PyTorch's stubs lack `clone`
        self._store = store.clone() if world.world_size > 1 else store
        self._place = (Phase.STARTING, 0)
        self._num_places = 0  # times that `_place` was set
        self._ticks = 0  # intervals since the start of the thread
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def on_phase(self, phase: Phase, step: int | None = None) -> None:
        """Record that this rank starts `phase` of `step`. None is the same step as before."""
        self._place = (phase, self._place[1] if step is None else step)
        self._num_places += 1

    def _watch(self) -> None:
        seen, since = self._num_places, 0
        failure, failed = None, 0
        while not self._stopped.wait(self._interval):
            self._ticks += 1
            if self._num_places != seen:
                seen, since = self._num_places, self._ticks
            self._write_row(since)
            if failure is None:
                failure, failed = self._find_failure(), self._ticks
            elif (self._ticks - max(since, failed)) * self._interval > FAILURE_SECONDS:
                _end(f"{self._world.name} stopped, since {failure}", EXIT_FAILED)
            if (self._ticks - since) * self._interval > self._timeout:
                report = self._look_again(seen, since)
                if report is not None:
                    _end(report)

    def _write_row(self, since: int) -> None:
        phase, step = self._place
        row = {
            "phase": phase.value,
            "step": step,
            "seconds": (self._ticks - since) * self._interval,
            "ticks": self._ticks,
            "host": socket.gethostname(),
        }
        with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, is gone: the report says so
            self._store.set(f"place/{self._world.rank}", json.dumps(row))

    def _find_failure(self) -> str | None:
        """The failure of another rank."""
        with contextlib.suppress(RuntimeError):  # as above
            return find_failure(self._store)
        return None

    def _look_again(self, seen: int, since: int) -> str | None:
        """Where each rank is, after it had the time to write that; None if this rank has made progress meanwhile."""
        earlier = self._read_rows()
        for _ in range(_LOOKS):
            if self._stopped.wait(self._interval):
                return None
            self._ticks += 1
            self._write_row(since)
        if self._num_places != seen:
            return None
        rows = self._read_rows()
        if self._place[0] == Phase.EVALUATION and self._any_progress(earlier, rows):
            return None
        lines = [f"{self._world.name}: no progress for {self._timeout:g} s (runtime.hang_timeout). Where each rank is:"]
        for rank, (before, row) in enumerate(zip(earlier, rows, strict=True)):
            if isinstance(row, str):
                lines.append(f"  rank {rank}: {row}")
                continue
            silent = isinstance(before, dict) and before["ticks"] == row["ticks"]
            # The watchdogs of all ranks start together, so that their counts tell how long one of them has stood still.
            seconds = max(_LOOKS, self._ticks - row["ticks"]) * self._interval
            lost = f"; NOT HEARD FROM for {seconds:.0f} s" if silent else ""
            place = f"step {row['step']}, {row['phase']}, since {row['seconds']:.0f} s"
            lines.append(f"  rank {rank} on {row['host']}: {place}{lost}")
        return "\n".join(lines)

    def _any_progress(self, earlier: list[dict[str, Any] | str], rows: list[dict[str, Any] | str]) -> bool:
        """Whether a rank that is heard from has made progress within the timeout.

        In an evaluation, ranks have different work and wait for each other.
        """
        pairs = [(a, b) for a, b in zip(earlier, rows, strict=True) if isinstance(a, dict) and isinstance(b, dict)]
        return any(a["ticks"] != b["ticks"] and b["seconds"] <= self._timeout for a, b in pairs)

    def _read_rows(self) -> list[dict[str, Any] | str]:
        """What each rank has written last, or why that is not known."""
        rows: list[dict[str, Any] | str] = []
        for rank in range(self._world.world_size):
            try:
                known = self._store.check([f"place/{rank}"])
                rows.append(json.loads(self._store.get(f"place/{rank}")) if known else "never heard from")
            except RuntimeError as error:
                rows.append(f"unknown, the store on rank 0 does not answer ({error})")
        return rows


def _end(report: str, status: int = EXIT_HUNG) -> None:
    """Print the report and all stacks, and end this process, whatever becomes of its output."""
    try:
        print(report, file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
    finally:
        os._exit(status)
