"""Ends a run that makes no progress, and reports where each rank stands."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Any

from dmtjepa.training.distributed import World
from dmtjepa.training.phase import Phase

EXIT_HUNG = 70


class Watchdog:
    """Reports where each rank stands, and ends the process, after `timeout` seconds without progress.

    A thread on each rank writes the phase and step of that rank into the store every few seconds. A collective that
    hangs, hangs on all ranks: the report shows which of them is in another phase, or has not been heard from.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._interval = min(5.0, timeout / 8)
        # Waiting in a TCPStore blocks its connection: the thread has its own.
        store: Any = world.store  # PyTorch's stubs lack `clone`
        self._store = store.clone() if world.world_size > 1 else store
        self._place = (Phase.STARTING, 0, time.time())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join()

    def on_phase(self, phase: Phase, step: int | None = None) -> None:
        """Record that this rank starts `phase` of `step`. None is the same step as before."""
        self._place = (phase, self._place[1] if step is None else step, time.time())

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            phase, step, since = self._place
            row = {
                "phase": phase.value,
                "step": step,
                "since": since,
                "host": socket.gethostname(),
                "heard": time.time(),
            }
            with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, is gone: the report says so
                self._store.set(f"place/{self._world.rank}", json.dumps(row))
            if time.time() - since > self._timeout:
                self._report()
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        time.sleep(2 * self._interval)  # let every rank write where it stands now
        lines = [f"{self._world.name}: no progress for {self._timeout:g} s (runtime.hang_timeout). Where each rank is:"]
        now = time.time()
        for rank in range(self._world.world_size):
            try:
                if not self._store.check([f"place/{rank}"]):
                    lines.append(f"  rank {rank}: never heard from")
                    continue
                row = json.loads(self._store.get(f"place/{rank}"))
            except RuntimeError as error:
                lines.append(f"  rank {rank}: unknown, the store on rank 0 does not answer ({error})")
                continue
            place = f"step {row['step']}, {row['phase']}, since {now - row['since']:.0f} s"
            silent = now - row["heard"]
            lost = f"; NOT HEARD FROM for {silent:.0f} s" if silent > 4 * self._interval else ""
            lines.append(f"  rank {rank} on {row['host']}: {place}{lost}")
        print("\n".join(lines), file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
