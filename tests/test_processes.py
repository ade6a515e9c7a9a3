"""Children end with their parent and hold nothing of it."""

from __future__ import annotations

import fcntl
import multiprocessing.util
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
from multiprocessing.connection import Listener

import pytest

from dmtjepa.processes import (
    STOP_SIGNALS,
    blocked_signals,
    die_with_parent,
    enter_worker,
    private_descriptor,
    shorten_socket_names,
)


def fork(work) -> int:
    """Run `work` in a forked child, which then ends. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_child_ends_when_its_parent_is_killed():
    """The end of a pipe that only the grandchild holds shows its death."""
    end, held = os.pipe()

    def start_child_and_wait():
        os.close(end)
        ready, done = os.pipe()

        def wait_forever():
            die_with_parent()
            os.write(done, b"x")
            while True:
                signal.pause()

        fork(wait_forever)
        os.read(ready, 1)
        os.close(held)
        os.kill(os.getpid(), signal.SIGKILL)

    parent = fork(start_child_and_wait)
    os.close(held)
    assert exit_code(parent) == -signal.SIGKILL
    assert select.select([end], [], [], 240)[0], "the child is left"  # the time only ends a hang
    assert os.read(end, 1) == b""
    os.close(end)


def test_child_whose_parent_is_gone_ends_at_once():
    assert exit_code(fork(lambda: die_with_parent(parent=1 << 22))) == 1
    parent = os.getpid()
    assert exit_code(fork(lambda: die_with_parent(parent))) == 0


def test_worker_leaves_signals_to_its_parent_and_closes_its_sockets():
    parent = os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socketpair()[0] as connection:

        def work():
            enter_worker(parent)
            for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
                assert signal.getsignal(number) is signal.SIG_IGN
            os.fstat(connection.fileno())
            with pytest.raises(OSError):
                os.fstat(listener.fileno())
            listener.detach()

        assert exit_code(fork(work)) == 0


def test_lock_is_not_held_by_a_forked_child(tmp_path):
    """Without that, the lock of a killed run would last as long as its slowest child."""
    path = tmp_path / ".lock"
    release, wait = os.pipe()
    ready, started = os.pipe()
    with path.open("w") as file, private_descriptor(file.fileno()):
        fcntl.flock(file, fcntl.LOCK_EX)
        child = fork(lambda: (os.close(wait), os.write(started, b"x"), os.read(release, 1)))
        os.read(ready, 1)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(wait)
    assert exit_code(child) == 0
    for descriptor in (release, ready, started):
        os.close(descriptor)


def test_blocked_signals_arrive_later():
    """In this thread alone: another one, started earlier, may take a signal that is sent to the whole process."""
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with blocked_signals():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert received == []
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_long_temporary_folder_does_not_stop_children(tmp_path):
    """multiprocessing puts sockets into it, whose names have at most 107 bytes."""

    def work():
        multiprocessing.current_process()._config.pop("tempdir", None)
        tempfile.tempdir = str(tmp_path / ("t" * 100))
        os.mkdir(tempfile.tempdir)
        shorten_socket_names()
        Listener(family="AF_UNIX").close()
        assert not os.listdir(tempfile.tempdir)
        shutil.rmtree(multiprocessing.util.get_temp_dir())

    assert exit_code(fork(work)) == 0
