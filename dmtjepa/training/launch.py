"""Starting the processes of a run on this machine, and telling the user which of them failed first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from dmtjepa.config import Config
from dmtjepa.errors import UserError
from dmtjepa.output import protect_output
from dmtjepa.training.distributed import check_device, first_failure, process_group
from dmtjepa.training.estimate import OutOfMemory, explain_oom
from dmtjepa.training.loop import Outcome, train
from dmtjepa.training.signals import STOP_SIGNALS

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
    device = check_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    runtime = config.runtime
    with process_group(device, start_timeout=runtime.start_timeout, hang_timeout=runtime.hang_timeout) as world:
        with first_failure(world):
            try:
                outcome = train(config, world)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(explain_oom(config, world.world_size, device, error)) from error
        if world.rank == 0:
            how = "finished" if outcome.complete else "stopped by a signal and saved"
            place = f"step {outcome.step} of {outcome.num_steps}"
            print(f"{how} at {place}; the run is in {config.logging.path}", file=sys.stderr)
        return outcome


def hand_over(outcome: Outcome) -> None:
    """Give the signal that stopped a run to whoever handled it before; by default the system ends the process."""
    if not outcome.complete:
        signal.raise_signal(outcome.signals[-1])


def launch(config: Config, devices: Sequence[str]) -> int:
    """Run one process per device on this machine; returns the exit code, which is not 0 after a failure or a signal.

    One device runs in this process. Otherwise, the traceback of the process that failed first is printed, and the
    others are ended. SIGTERM, SIGUSR1 and SIGUSR2 are passed on to all.
    """
    if len(devices) == 1:
        hand_over(run_process(config, devices[0]))
        return 0
    # This process serves the store, so its port is known before anyone needs it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    # Children fork from a server that has imported everything once and never touched a GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="dmtjepa-errors-") as folder:
        processes = [
            context.Process(
                target=_run_child, args=(config, name, rank, len(devices), store.port, folder), name=f"rank {rank}"
            )
            for rank, name in enumerate(devices)
        ]
        for process in processes:
            process.start()
        previous = {
            number: signal.signal(number, lambda received, _: _pass_on(processes, received)) for number in STOP_SIGNALS
        }
        try:
            return _watch(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)


def _pass_on(processes: Sequence[multiprocessing.Process], number: int) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _watch(processes: Sequence[multiprocessing.Process], folder: Path) -> int:
    """Wait for all processes, or for the first failure."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                return _report(processes, folder)
    return 0


def _report(processes: Sequence[multiprocessing.Process], folder: Path) -> int:
    """Print the first failure; returns the exit code of the run."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    failures = sorted(
        (path.read_text() for path in folder.glob("*.txt")), key=lambda text: float(text.split("\n", 1)[0])
    )
    if failures:
        print(failures[0].split("\n", 1)[1], file=sys.stderr)
        return 1
    ended = [process for process in processes if process.exitcode]
    code = ended[0].exitcode
    if code > 0:
        print(f"{ended[0].name} ended with exit code {code}; its messages are above", file=sys.stderr)
        return code
    if all(process.exitcode in (code, 0) for process in processes) and -code in STOP_SIGNALS:
        return 128 - code  # all were asked to stop, saved, and did
    reason = " (often: no memory left)" if code == -signal.SIGKILL else ""
    print(f"{ended[0].name} was ended by {signal.Signals(-code).name}{reason}", file=sys.stderr)
    return 128 - code


def _run_child(config: Config, device_name: str, rank: int, world_size: int, port: int, folder: str) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
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
        text = f"{time.monotonic()}\nrank {rank} of {world_size} failed:\n{report}"
        writing = Path(folder, f"{rank}.writing")
        writing.write_text(text)
        writing.rename(Path(folder, f"{rank}.txt"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # teardown would wait for the others


def _die_with_parent() -> None:
    """Without its parent, which was killed, a process must not go on writing into the run folder."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
