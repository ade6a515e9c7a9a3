"""Processes of a run and their children: none outlives its parent, and none holds what belongs to its parent."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to save and stop."""

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

# multiprocessing adds up to 33 bytes to the path of its folder; a socket's name has at most 107.
_MAX_FOLDER_BYTES = 70

_private_descriptors: set[int] = set()


def die_with_parent(parent: int | None = None) -> None:
    """Make the system kill this process when the thread that started it ends, in whichever way.

    Linux only. Elsewhere this does nothing.

    Args:
        parent: process id of the parent. This process ends at once if the parent is already gone. None: not checked.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def enter_worker(parent: int) -> None:
    """Prepare a process that was forked to load data: it ends with its parent, and leaves stop signals to it.

    SIGTERM keeps its handler. The sockets on which the parent listens are closed in this process.

    Args:
        parent: process id of the parent.
    """
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    _close_listening_sockets()


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold back stop signals until the end of the block. Processes that start in it hold them back for good."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def shorten_socket_names() -> None:
    """Keep the sockets of multiprocessing out of a temporary folder whose path is too long for them.

    Call it before the first child that shares tensors or forks from a server. Children inherit the choice.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" in settings or len(os.fsencode(tempfile.gettempdir())) <= _MAX_FOLDER_BYTES:
        return
    folder = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)
    settings["tempdir"] = folder


@contextlib.contextmanager
def private_descriptor(descriptor: int) -> Iterator[None]:
    """Close a file descriptor in processes that are forked within the block.

    A lock of `flock` belongs to all processes that share the descriptor, and is held until the last of them closes it.
    """
    _private_descriptors.add(descriptor)
    try:
        yield
    finally:
        _private_descriptors.discard(descriptor)


def _close_private_descriptors() -> None:
    for descriptor in _private_descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _private_descriptors.clear()


os.register_at_fork(after_in_child=_close_private_descriptors)


def _close_listening_sockets() -> None:
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        descriptor = int(name)
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _is_listening(descriptor):
                os.close(descriptor)


def _is_listening(descriptor: int) -> bool:
    probe = socket.socket(fileno=os.dup(descriptor))
    with probe:
        return bool(probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
