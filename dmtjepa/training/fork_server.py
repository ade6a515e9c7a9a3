"""The server that the ranks of a run fork from. It has imported everything once and never touches a GPU."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import wait
from threading import Thread

from dmtjepa.processes import STOP_SIGNALS, blocked_signals, die_with_parent, shorten_socket_names


def start_fork_server(modules: Sequence[str] = ()) -> None:
    """Start the server, if it does not run yet. A stop signal to the whole process group does not end it.

    Args:
        modules: imported by the server, besides those that train.
    """
    shorten_socket_names()
    multiprocessing.forkserver.set_forkserver_preload(["dmtjepa.training.fork_server_start", *modules])
    # Both processes inherit the mask. One block for each: the resource tracker's start resets a part of the mask.
    with blocked_signals():
        multiprocessing.resource_tracker.ensure_running()
    with blocked_signals():
        multiprocessing.forkserver.ensure_running()


def enter_rank() -> None:
    """Prepare a process that the server has forked: it ends with its parents, and receives signals again."""
    die_with_parent()
    Thread(target=_wait_for_parent, name="parent", daemon=True).start()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C before training starts needs no traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Loader workers fork from the rank, as in a run of one process. By default each rank would start another server.
    multiprocessing.set_start_method("fork", force=True)


def _wait_for_parent() -> None:
    """End this process when the one that started the run ends. The server may live a moment longer."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
