"""Starting the processes of a run on this machine, and telling the user which of them failed first."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from dmtjepa.config import Config
from dmtjepa.devices import check_device, release_memory
from dmtjepa.errors import UserError
from dmtjepa.evaluation.verdict import describe_end
from dmtjepa.output import configure_logging, protect_output
from dmtjepa.processes import STOP_SIGNALS
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.distributed import DistributedError, first_failure, process_group, read_rank
from dmtjepa.training.estimate import OutOfMemory, explain_oom
from dmtjepa.training.fork_server import enter_rank, start_fork_server
from dmtjepa.training.loop import Outcome, train
from dmtjepa.training.signals import StopSignals, end_by

# After the first failure the other processes have this long to fail by themselves, which tells more than being killed.
GRACE_SECONDS = 2.0


def default_devices() -> list[str]:
    """All CUDA devices of this machine, or else the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def run_process(config: Config, device_name: str) -> Outcome:
    """One process of a run: join the others and train.

    Raises the process's own failure, or DistributedError with the failure that another process met first.
    """
    protect_output()
    configure_logging(read_rank()[0])
    device = check_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    runtime = config.runtime
    with process_group(device, start_timeout=runtime.start_timeout, hang_timeout=runtime.hang_timeout) as world:
        with first_failure(world):
            try:
                outcome = train(config, world)
                while outcome.rolled_back and not outcome.signals:
                    release_memory(device)
                    outcome = train(config, world)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(explain_oom(config, world.world_size, device, error)) from error
        if world.rank == 0:
            print(describe_outcome(outcome, config.logging.path), file=sys.stderr, flush=True)
            rows = RunFolder.from_config(config).read_metrics() if outcome.complete else []
            for sentence in describe_end(rows, config.patch):
                print(sentence, file=sys.stderr, flush=True)
        return outcome


def describe_outcome(outcome: Outcome, folder: Path) -> str:
    """How a run ended, in a sentence for its user."""
    place = f"step {outcome.step} of {outcome.num_steps}; the run is in {folder}"
    if outcome.complete:
        return f"finished at {place}"
    how = "stopped by a signal and saved at" if outcome.step else "stopped by a signal before the first step, at"
    return f"{how} {place}; start it again with the same settings to continue"


def hand_over(outcome: Outcome) -> None:
    """Give the signal that stopped a run to its previous handler. By default the system ends the process."""
    if not outcome.complete:
        end_by(outcome.signals[-1])


def launch(config: Config, devices: Sequence[str]) -> int:
    """Run one process per device on this machine.

    One device runs in this process. Otherwise this process prints the traceback of the process that failed first and
    ends the others. Stop signals are passed on to all of them, and a second Ctrl-C kills them.

    Returns:
        The exit code: 0, 1 after a failure, or 128 + number after a signal.
    """
    if len(devices) == 1:
        hand_over(run_process(config, devices[0]))
        return 0
    start_fork_server()  # before the store, whose socket it must not inherit
    store = _serve_store()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="dmtjepa-errors-") as folder:
        processes: list[BaseProcess] = [
            context.Process(
                target=_run_child, args=(config, name, rank, len(devices), store.port, folder), name=f"rank {rank}"
            )
            for rank, name in enumerate(devices)
        ]
        try:
            signals = _PassOn(processes)
            with signals:
                for process in processes:
                    process.start()
                for number in signals.received:  # those that came before all ranks had started
                    signals.pass_on(number)
                return _watch(processes, Path(folder))
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()


def _serve_store() -> dist.TCPStore:
    """A store for the ranks on this machine: it listens on the loopback interface alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),
    )  # fmt: skip


class _PassOn(StopSignals):
    """While entered, passes stop signals on to the ranks. A second Ctrl-C ends this process with status 130."""

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        super().__init__()
        self._processes = processes

    def _record(self, number: int, frame: FrameType | None) -> None:
        super()._record(number, frame)
        self.pass_on(number)

    def pass_on(self, number: int) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def _end(self, number: int) -> None:
        raise SystemExit(128 + number)  # `launch` kills the ranks


def _watch(processes: Sequence[BaseProcess], folder: Path) -> int:
    """Wait for all processes, or for the first failure."""
    running: dict[object, BaseProcess] = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait([process.sentinel for process in running.values()]):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                return _report(processes, folder)
    return 0


def _report(processes: Sequence[BaseProcess], folder: Path) -> int:
    """Print the first failure; returns the exit code of the run."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    failures = sorted(
        (path.read_text() for path in folder.glob("*.txt")), key=lambda text: float(text.split("\n", 1)[0])
    )
    codes = [(process.name, process.exitcode) for process in processes if process.exitcode]
    if failures:
        print(failures[0].split("\n", 1)[1], file=sys.stderr)
        for name, code in codes:
            if code < 0:  # the others can only tell that they lost it
                print(_describe_kill(name, -code), file=sys.stderr)
        return 1
    name, code = codes[0]
    if code > 0:
        print(f"{name} ended with exit code {code}; its messages are above", file=sys.stderr)
        return code
    if all(process.exitcode in (code, 0) for process in processes) and -code in STOP_SIGNALS:
        return 128 - code  # all were asked to stop, saved, and did
    print(_describe_kill(name, -code), file=sys.stderr)
    return 128 - code


def _describe_kill(name: str, number: int) -> str:
    reason = " (often: no memory left)" if number == signal.SIGKILL else ""
    return f"{name} was ended by {signal.Signals(number).name}{reason}"


def _run_child(config: Config, device_name: str, rank: int, world_size: int, port: int, folder: str) -> None:
    enter_rank()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served already, by the parent
    }
    try:
        hand_over(run_process(config, device_name))
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        known = isinstance(error, UserError)
        report = f"{type(error).__name__}: {error}" if known else traceback.format_exc()
        # What quotes the failure of another rank comes after it.
        when = math.inf if isinstance(error, DistributedError) else time.monotonic()
        text = f"{when}\nrank {rank} of {world_size} failed:\n{report}"
        writing = Path(folder, f"{rank}.writing")
        writing.write_text(text)
        writing.rename(Path(folder, f"{rank}.txt"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # teardown would wait for the others
