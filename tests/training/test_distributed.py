"""Joining, agreeing, failing and hanging."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dmtjepa.training import watchdog as watchdog_module
from dmtjepa.training.distributed import STORE_SECONDS, DistributedError, World, first_failure, process_group
from dmtjepa.training.launch import _report, launch
from dmtjepa.training.phase import Phase
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.vote import RankVote, Vote
from dmtjepa.training.watchdog import EXIT_FAILED, EXIT_HUNG, Watchdog
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def join():
    return process_group(CPU, start_timeout=600, hang_timeout=3600)


def check_start_of_rank():
    """FSDP2 imports torch._dynamo, which takes a second."""
    assert "torch._dynamo" in sys.modules
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


@pytest.mark.slow
def test_the_server_has_imported_what_a_rank_needs(tmp_path):
    """No collection in a rank writes to the memory that it shares with the server."""
    assert run_ranks(check_start_of_rank, 1, tmp_path) == [(0, "")]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "reason"), [(0, r"ranks \[1\] have not come"), (1, "")])
def test_process_alone_of_two_fails_in_time_and_says_who_it_is(monkeypatch, rank, reason):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    started = time.monotonic()
    text = (
        rf"rank {rank} of 2 on {socket.gethostname()} could not join the run at 127.0.0.1:{port} within 2 s.*{reason}"
    )
    with pytest.raises(DistributedError, match=text), process_group(CPU, start_timeout=2, hang_timeout=3600):
        pass
    assert time.monotonic() - started < 300  # the defaults of torch.distributed are 10 and 30 minutes


GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE=2 is set and RANK is not: unset WORLD_SIZE to train on this machine"),
        ({"MASTER_ADDR": None}, "RANK=0 is set and MASTER_ADDR is not: unset RANK"),
        ({"WORLD_SIZE": None, "MASTER_PORT": ""}, "RANK=0 is set and WORLD_SIZE, MASTER_PORT are not"),
        ({"RANK": "2"}, "RANK=2 is not one of the ranks 0 to 1 of WORLD_SIZE=2"),
        ({"RANK": "first"}, "RANK=first is not a number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1 is not a number"),
    ],
)
def test_variables_that_describe_no_group_are_named_at_once(monkeypatch, changes, message):
    for name, value in (GROUP | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError) as error, join():
        pass
    assert message in str(error.value)


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": ""}, {"MASTER_PORT": "1"}])
def test_a_process_without_rank_trains_alone(monkeypatch, values):
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with join() as world:
        assert (world.rank, world.world_size) == (0, 1)


def cast_votes():
    with join() as world:
        vote = RankVote(dist.new_group(backend="gloo"))
        votes = [Vote.CONTINUE] * 5
        if world.rank == 1:
            votes[2] = Vote.FAIL
        if world.rank == 0:
            votes[4] = Vote.STOP
        results = [vote.cast(value) for value in votes]
        assert results == [Vote.CONTINUE, Vote.CONTINUE, Vote.CONTINUE, Vote.FAIL, Vote.CONTINUE], results
        assert vote.finish() == Vote.STOP


@pytest.mark.slow
def test_all_ranks_learn_of_a_vote_in_the_same_round(tmp_path):
    assert [code for code, _ in run_ranks(cast_votes, 2, tmp_path)] == [0, 0]


def fail_on(failing, how):
    with join() as world, first_failure(world):
        dist.all_reduce(torch.ones(1))
        if world.rank == failing:
            if how == "raise":
                raise KeyError("what went wrong")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 2])
def test_every_rank_quotes_the_failure_that_came_first(tmp_path, failing):
    ends = run_ranks(fail_on, 3, tmp_path, failing, "raise")
    assert [code for code, _ in ends] == [1, 1, 1]
    for rank, (_, text) in enumerate(ends):
        if rank == failing:
            assert text.startswith("KeyError: 'what went wrong'")
        else:
            host = socket.gethostname()
            assert (
                f"rank {rank} of 3 on {host} stopped, since rank {failing} of 3 on {host} failed first: KeyError"
                in text
            )


@pytest.mark.slow
def test_rank_that_vanishes_is_reported_as_lost(tmp_path):
    ends = run_ranks(fail_on, 2, tmp_path, 1, "kill")
    assert [code for code, _ in ends] == [1, -signal.SIGKILL]
    assert ends[0][1].startswith("LostPeer: rank 0 of 2")


def hang():
    with join() as world, Watchdog(world, timeout=10) as watchdog:
        watchdog.on_phase(Phase.BACKWARD, 7)
        dist.all_reduce(torch.ones(1))
        if world.rank == 1:
            watchdog.on_phase(Phase.DATA, 8)
            time.sleep(600)
        watchdog.on_phase(Phase.TARGETS, 8)
        dist.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_hung_collective_ends_with_a_report_of_where_each_rank_stood(tmp_path):
    ends = run_ranks(hang, 2, tmp_path)
    assert [code for code, _ in ends] == [EXIT_HUNG, EXIT_HUNG]
    host = socket.gethostname()
    for rank, (_, text) in enumerate(ends):
        assert f"rank {rank} of 2 on {host}: no progress for 10 s" in text
        assert f"rank 0 on {host}: step 8, targets" in text
        assert f"rank 1 on {host}: step 8, data" in text
        assert "in hang" in text  # its own stack


def suspend():
    """All ranks are stopped for longer than the watchdog's timeout, as a suspended job is: rank 0 in a collective."""
    with join() as world, Watchdog(world, timeout=8) as watchdog:
        for step in range(10):
            watchdog.on_phase(Phase.BACKWARD, step)
            if step == 5:
                wait_until_noted(world, step)
                if world.rank == 0:
                    world.store.set("pid", str(os.getpid()))
                else:
                    pids = f"{world.store.get('pid').decode()} {os.getpid()}"
                    subprocess.run(["sh", "-c", f"kill -STOP {pids}; sleep 10; kill -CONT {pids}"], check=True)
            dist.all_reduce(torch.ones(1))


def wait_until_noted(world, step):
    """Wait until the watchdog of this rank has seen a step: without progress after it, its time runs."""
    key = f"place/{world.rank}"
    while not world.store.check([key]) or json.loads(world.store.get(key))["step"] != step:
        time.sleep(0.05)


@pytest.mark.slow
def test_suspended_job_goes_on(tmp_path):
    assert run_ranks(suspend, 2, tmp_path) == [(0, ""), (0, "")]


def wait_for_a_device():
    """Rank 1 fails; rank 0 waits in a call that knows nothing of it, as one that waits for its GPU does."""
    watchdog_module.FAILURE_SECONDS = 1.0
    with join() as world, first_failure(world), Watchdog(world, timeout=3600) as watchdog:
        watchdog._interval = 0.1
        watchdog.on_phase(Phase.LOGGING, 7)
        if world.rank == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        threading.Event().wait()


@pytest.mark.slow
def test_a_rank_that_waits_for_its_device_ends_after_another_one_has_failed(tmp_path):
    ends = run_ranks(wait_for_a_device, 2, tmp_path)
    assert [code for code, _ in ends] == [EXIT_FAILED, 1]
    host = socket.gethostname()
    assert f"rank 0 of 2 on {host} stopped, since rank 1 of 2 on {host} failed first: RuntimeError: CUDA" in ends[0][1]
    assert "in wait_for_a_device" in ends[0][1]  # its own stack


def test_a_failed_rank_serves_the_store_until_the_watchdogs_have_read_it():
    assert Watchdog(World(0, 1, CPU, dist.HashStore()), timeout=86400)._interval * 2 < STORE_SECONDS


class Ticks:
    """An event whose waits end at once. It is set after `count` of them; `between` is called before each."""

    def __init__(self, count, between):
        self.count, self.between = count, between

    def wait(self, seconds):
        self.between()
        self.count -= 1
        return self.count < 0

    def set(self):
        self.count = 0


def watch(monkeypatch, count, between):
    """The reports of a watchdog of 80 s, which counts intervals of 5 s, after `count` of them."""
    reports = []
    monkeypatch.setattr("dmtjepa.training.watchdog._end", reports.append)
    watchdog = Watchdog(World(0, 1, CPU, dist.HashStore()), timeout=80)
    watchdog._stopped = Ticks(count, lambda: between(watchdog))
    with watchdog:
        watchdog._thread.join()
    return reports


def test_jumps_of_the_clock_do_not_end_a_run(monkeypatch):
    hours = [0]

    def jump(watchdog):
        hours[0] += 1

    for name, clock in {"time": time.time, "monotonic": time.monotonic}.items():
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + 3600 * hours[0])
    assert watch(monkeypatch, 15, jump) == []


def test_watchdog_looks_again_before_it_ends_a_run(monkeypatch):
    ticks = [0]

    def progress(watchdog):
        ticks[0] += 1
        if ticks[0] == 18:  # the timeout has passed at the 17th
            watchdog.on_phase(Phase.DATA, 1)

    assert watch(monkeypatch, 25, progress) == []
    assert "rank 0 of 1" in watch(monkeypatch, 22, lambda watchdog: None)[0]


def test_ranks_that_wait_in_an_evaluation_for_one_that_works_do_not_end_the_run(monkeypatch):
    def evaluate(watchdog):
        watchdog._place = (Phase.EVALUATION, 8)  # no progress since the start

    assert len(watch(monkeypatch, 22, evaluate)) == 1
    rows = {"ticks": 3, "seconds": 100.0}, {"ticks": 3, "seconds": 5.0}
    watchdog = Watchdog(World(0, 2, CPU, dist.HashStore()), timeout=80)
    later = [row | {"ticks": 6} for row in rows]
    assert watchdog._any_progress([*rows, "never heard from"], [*later, "never heard from"])
    assert not watchdog._any_progress([rows[0]], [later[0]])
    assert not watchdog._any_progress(list(rows), [later[0], rows[1]])  # the working rank is gone
    monkeypatch.setattr(Watchdog, "_any_progress", lambda *_: True)
    assert watch(monkeypatch, 22, evaluate) == []
    assert len(watch(monkeypatch, 22, lambda watchdog: None)) == 1  # in other phases all ranks go on together


@pytest.mark.slow
def test_first_traceback_is_what_the_user_sees(settings, capfd):
    config = settings(**{"data.batch_size": 8})
    assert launch(config, ["cpu", "cuda:9"]) == 1
    printed = capfd.readouterr().err
    assert "rank 1 of 2 failed:" in printed
    assert "DeviceError: device 'cuda:9'" in printed or "device cuda:9: this machine has" in printed
    assert "rank 0 of 2 failed" not in printed


@pytest.mark.slow
def test_the_rank_that_failed_first_speaks_for_those_that_quote_it(settings, capfd):
    assert launch(settings(**{"data.batch_size": 4096}), ["cpu", "cpu"]) == 1
    printed = capfd.readouterr().err
    assert "failed:\nDataError: the batch is larger than the data set" in printed
    assert "DistributedError" not in printed


def ended(rank, code):
    """A process of `launch` that has ended."""
    return SimpleNamespace(name=f"rank {rank}", exitcode=code, join=lambda timeout: None)


def test_of_several_failures_the_first_is_printed(tmp_path, capsys):
    (tmp_path / "0.txt").write_text("10.5\nrank 0 of 2 failed:\nwhat follows")
    (tmp_path / "1.txt").write_text("9.75\nrank 1 of 2 failed:\nthe cause")
    assert _report([ended(0, 1), ended(1, 1)], tmp_path) == 1
    assert capsys.readouterr().err == "rank 1 of 2 failed:\nthe cause\n"


def test_a_rank_that_was_killed_is_named_after_those_that_lost_it(tmp_path, capsys):
    (tmp_path / "0.txt").write_text("9.75\nrank 0 of 2 failed:\nLostPeer: it lost another rank")
    assert _report([ended(0, 1), ended(1, -signal.SIGKILL)], tmp_path) == 1
    assert capsys.readouterr().err.endswith("another rank\nrank 1 was ended by SIGKILL (often: no memory left)\n")


def test_signals_are_noted_and_handlers_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == [signal.SIGUSR1, signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) is before
