"""Programs of the project in forked processes of their own session, which have imported everything already.

A kill test starts hundreds of them. The fork server of `main.py` is forked too, instead of importing torch once more.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path
from typing import NamedTuple, NoReturn

from dmtjepa.processes import STOP_SIGNALS, die_with_parent

POLL_SECONDS = 0.002


class Row(NamedTuple):
    """A process, as /proc tells it."""

    pid: int
    parent: int
    session: int
    name: str


def list_processes() -> list[Row]:
    """All processes of the machine, apart from zombies."""
    rows = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            before, _, after = (folder / "stat").read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        state, parent, _, session = after.split()[:4]
        if state not in "ZX":
            rows.append(Row(int(folder.name), int(parent), int(session), before.partition("(")[2]))
    return rows


class Program:
    """A program that runs in a session of its own.

    Args:
        main: the program; returns its exit code.
        arguments: its command line, with its name.
        log: file that its output is added to.
    """

    def __init__(self, main: Callable[[], int], arguments: Sequence[str], log: Path) -> None:
        self.code: int | None = None  # the exit code, or minus the signal
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        harness = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                die_with_parent(harness)
                run_program(main, arguments, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
            finally:
                os._exit(1)
        while os.getsid(self.pid) != self.pid:
            time.sleep(POLL_SECONDS)

    def is_running(self) -> bool:
        """Whether the first process runs. Its exit code is collected when it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float) -> bool:
        """Wait for the first process to end; returns whether it has."""
        deadline = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return not self.is_running()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Wait for a condition; returns False if the program ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.is_running() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return self.is_running()

    def members(self) -> list[Row]:
        """All processes of the session that run."""
        return [row for row in list_processes() if row.session == self.pid]

    def ranks(self) -> list[int]:
        """The ranks of a training run: the children of the fork server, or the program itself."""
        rows = self.members()
        parents = {row.parent for row in rows}
        servers = [row.pid for row in rows if row.parent == self.pid and row.pid in parents]
        return [row.pid for row in rows if row.parent in servers] or [self.pid]

    def kill_all(self) -> None:
        """End every process of the session."""
        for row in self.members():
            try:
                os.kill(row.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(60)


def fork_instead_of_import() -> None:
    """Fork the fork server from the process that starts it, for this process and those that it forks."""
    spawn = util.spawnv_passfds

    def fork(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        code = arguments[-1]
        if not code.startswith("from multiprocessing.forkserver"):
            return spawn(path, arguments, descriptors)
        pid = os.fork()
        if pid == 0:
            try:
                multiprocessing.forkserver._forkserver._lock.release()  # held while the server is started
                kept = {0, 1, 2, *descriptors}
                for name in os.listdir("/proc/self/fd"):
                    if int(name) not in kept:
                        _close(int(name))
                exec(code, {})
            finally:
                os._exit(0)
        return pid

    util.spawnv_passfds = fork


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # that of the listing itself is closed already
        os.close(descriptor)


def run_program(main: Callable[[], int], arguments: Sequence[str], output: int) -> NoReturn:
    """Run a program as the interpreter does, its output going to a file descriptor, and end this process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = list(arguments)
    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
