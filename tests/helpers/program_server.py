"""main.py as processes that fork from a server, which has imported everything once.

To import it takes most of the time of a short run. What a start by itself does is tested by others: by the first hour,
by torchrun and SLURM, and on fake GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.processes import die_with_parent

ROOT = Path(__file__).parents[2]


class ForkedProgram:
    """A program in a session of its own; the part of `subprocess.Popen` that tests use.

    Its two ends of pipes: what it and its children print, and a line with its process ID, then one with its exit code.
    """

    def __init__(self, output: int, status: int) -> None:
        self.stdout, self._status = os.fdopen(output), os.fdopen(status)
        self.returncode: int | None = None
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("main.py", timeout or 0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed, once no process holds its output."""
        late = threading.Timer(timeout or threading.TIMEOUT_MAX, self.kill)
        late.daemon = True
        late.start()
        output = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return output, None

    def kill(self) -> None:
        """End all processes of the session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class ProgramServer:
    """The server, from the side of the tests."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.program_server", str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def start(self, arguments: Sequence[str], largest_file: int | None = None) -> ForkedProgram:
        """Run main.py with these arguments, and perhaps a limit on the bytes of a file."""
        output, status = os.pipe(), os.pipe()
        request = json.dumps([list(arguments), largest_file]).encode()
        socket.send_fds(self._socket, [request], [output[1], status[1]])
        os.close(output[1])
        os.close(status[1])
        return ForkedProgram(output[0], status[0])

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


def serve(requests: socket.socket) -> None:
    """Fork a program for each request, until the tests close their end."""
    import torch._dynamo  # noqa: F401  # FSDP2 imports it at its first use

    import dmtjepa.training.launch  # noqa: F401
    import main
    import tests.helpers.tiny_architecture  # noqa: F401
    from tests.helpers.programs import fork_instead_of_import, run_program

    fork_instead_of_import()
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 2)
        if not message:
            return
        output, status = descriptors
        waiting = os.fork()
        if waiting == 0:
            try:
                requests.close()
                with open(status, "w", buffering=1) as report:
                    program = os.fork()
                    if program == 0:
                        report.close()
                        os.setsid()
                        arguments, largest_file = json.loads(message)
                        if largest_file is not None:
                            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
                        run_program(main.main, arguments, output)
                    os.close(output)
                    print(program, file=report)
                    print(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), file=report)
            finally:
                os._exit(0)
        os.close(output)
        os.close(status)


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    serve(socket.socket(fileno=int(sys.argv[1])))
