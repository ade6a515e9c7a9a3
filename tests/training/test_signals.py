"""Runs that are told to stop, or killed: what is saved, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dmtjepa import checkpoint_format
from dmtjepa.training import signals as signals_module
from dmtjepa.training.launch import describe_outcome
from dmtjepa.training.loop import Outcome
from dmtjepa.training.signals import StopSignals
from tests.helpers.program_server import ForkedProgram

TIMEOUT = 240  # only ends a hang
LONG = {"optimization.epochs": 200, "runtime.keep_every_epochs": 1000, "runtime.save_every_epochs": 1000}


@pytest.fixture
def start_long(settings, start, losses):
    """start_long(processes, workers) -> settings and process of a run that has done a few steps."""

    def run(processes: int, workers: int = 1, **changes):
        values = LONG | {"data.batch_size": 16 // processes, "data.num_workers": workers, "runtime.log_every": 1}
        config = settings(**values | changes)
        process = start(config, *["cpu"] * processes)
        csv = Path(config.logging.folder, "jepa_r0.csv")
        deadline = time.monotonic() + TIMEOUT
        while not csv.exists() or len(losses(config)) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return config, process

    return run


def read_to_the_end(process: ForkedProgram) -> str:
    """What a run prints. All processes of a run hold its output: the end shows that none of them is left."""
    output = process.communicate(timeout=TIMEOUT)[0]
    deadline = time.monotonic() + TIMEOUT
    while session_members(process.pid):
        assert time.monotonic() < deadline, session_members(process.pid)
        time.sleep(0.02)
    return output


def session_members(session: int) -> list[str]:
    """The processes of a session, apart from zombies."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if not line.split()[1].startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes", "send"),
    [
        (signal.SIGTERM, 2, os.killpg),
        (signal.SIGINT, 2, os.killpg),
        (signal.SIGINT, 1, os.killpg),
        (signal.SIGHUP, 2, os.killpg),
        (signal.SIGUSR1, 2, os.killpg),
        (signal.SIGUSR2, 2, os.kill),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", value)),
)
def test_signal_saves_and_ends(start_long, losses, number, processes, send):
    """To the group, as `timeout`, a Ctrl-C, a closed terminal and SLURM send it, and to the program alone."""
    config, process = start_long(processes)
    send(process.pid, number)
    output = read_to_the_end(process)
    assert process.returncode == (-number if processes == 1 else 128 + number), output
    found = checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints"))
    assert found is not None, output
    step = checkpoint_format.step_of(found)
    assert f"stopped by a signal and saved at step {step}" in output
    assert "start it again with the same settings to continue" in output
    assert "Traceback" not in output
    assert output.count("\nlength  ") == 1  # what the start says, once for all processes
    assert len(losses(config)) == step


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["main.py", "a rank", "the fork server"])
def test_killed_process_leaves_none_behind_and_the_run_starts_again(start_long, start, victim):
    config, process = start_long(2)
    servers = [pid for pid in children(process.pid) if children(pid)]
    assert len(servers) == 1
    ranks = children(servers[0])
    assert len(ranks) == 2
    assert all(children(rank) for rank in ranks)  # their loaders have workers
    os.kill({"main.py": process.pid, "a rank": ranks[1], "the fork server": servers[0]}[victim], signal.SIGKILL)
    read_to_the_end(process)
    assert process.returncode != 0
    if victim != "main.py":  # one restart is enough: nothing is left of any
        return
    again = start(config, "cpu", "cpu")
    printed = []
    while not any("  step " in line for line in printed):
        printed.append(again.stdout.readline())
        assert printed[-1], printed


@pytest.mark.slow
def test_no_process_listens_on_all_interfaces_and_a_second_interrupt_ends_at_once(start_long):
    """Without a checkpoint: the ranks are stopped, and cannot finish their step."""
    config, process = start_long(2)
    assert_no_process_listens_on_all_interfaces(process.pid)
    (server,) = (pid for pid in children(process.pid) if children(pid))
    for rank in children(server):
        os.kill(rank, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5 * signals_module.SAME_SECONDS)  # what comes sooner is the same Ctrl-C
    os.kill(process.pid, signal.SIGINT)
    output = read_to_the_end(process)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in output
    assert checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints")) is None


def assert_no_process_listens_on_all_interfaces(session: int) -> None:
    sockets = set()
    for line in session_members(session):
        for descriptor in Path(f"/proc/{line.split()[0]}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    listening = []
    for table, anywhere in (("tcp", "00000000:"), ("tcp6", "0" * 32 + ":")):
        for row in Path(f"/proc/{session}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1])
                assert not fields[1].startswith(anywhere)
    assert listening  # the store of the process group


def test_ignored_signals_stay_ignored():
    """SIGHUP under nohup, SIGINT of a command that a script runs in the background."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == []
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_interrupt_that_arrives_twice_counts_once(monkeypatch):
    """From the terminal and from torchrun; a second one of the user comes later."""
    now, ended = [0.0], []
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals_module, "end_by", ended.append)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        now[0] = 0.5
        signal.raise_signal(signal.SIGINT)
        assert signals.received == [signal.SIGINT, signal.SIGINT]
        assert ended == []
        now[0] = 1.5
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGINT]


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(8, 8, ()), "finished at step 8 of 8; the run is in runs/a"),
        (Outcome(3, 8, (15,)), "stopped by a signal and saved at step 3 of 8; the run is in runs/a; start it again"),
        (Outcome(8, 8, (12,), evaluated=False), "stopped by a signal and saved at step 8 of 8; "),
        (Outcome(0, 8, (15,), evaluated=False), "stopped by a signal before the first step, at step 0 of 8; "),
    ],
    ids=str,
)
def test_the_user_is_told_what_was_saved(outcome, said):
    assert describe_outcome(outcome, Path("runs/a")).startswith(said)
