"""`dmtjepa.train` and `dmtjepa.evaluate`: runs in the process of a script or a notebook."""

from __future__ import annotations

import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import dmtjepa
from dmtjepa.checkpoint_format import list_checkpoints, step_of
from dmtjepa.config import ConfigError
from dmtjepa.interface import InterfaceError
from dmtjepa.training import signals
from dmtjepa.training.step import TrainStep
from tests.helpers.run_folders import write_images

ONE_EPOCH = {"optimization.epochs": 1, "optimization.warmup": 0}


def state_of_process() -> tuple:
    """What a run changes in its process, and must put back."""
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    root = logging.getLogger()
    return handlers, sys.stdout, sys.stderr, root.handlers[:], root.level, torch.get_rng_state().tolist()


@pytest.fixture
def raise_at(monkeypatch):
    """raise_at(step, times) lets this process receive Ctrl-C in that step, so many times."""
    trained = TrainStep.__call__
    due: dict[int, int] = {}

    def train_step(self, micro_batches, step):
        for _ in range(due.pop(step, 0)):
            signal.raise_signal(signal.SIGINT)
        return trained(self, micro_batches, step)

    monkeypatch.setattr(TrainStep, "__call__", train_step)
    monkeypatch.setattr(signals, "SAME_SECONDS", -1.0)  # each is another Ctrl-C
    return due.__setitem__


@pytest.mark.slow
def test_a_run_in_this_process(settings, losses, tmp_path, raise_at, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that has configured none
    config = settings("run", **{"data.batch_size": 8})
    before = state_of_process()

    raise_at(2, 1)
    with pytest.raises(KeyboardInterrupt):
        dmtjepa.train(config, ONE_EPOCH, device="cpu")
    run = config.logging.path
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [4]  # ranks stop one step later
    raise_at(6, 2)
    with pytest.raises(KeyboardInterrupt):
        dmtjepa.train(config, ONE_EPOCH, device="cpu")
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [4]  # the second one ends it at once
    assert state_of_process() == before

    assert dmtjepa.train(run / "config.yaml", device="cpu") == run
    assert len(losses(config)) == 16
    assert state_of_process() == before
    assert not dist.is_initialized()

    write_images(tmp_path / "data" / "train", 10, seed=0)
    write_images(tmp_path / "data" / "val", 4, seed=1)
    report = dmtjepa.evaluate(run, tmp_path / "data", quick=True, device="cpu", progress=False, max_images=12)
    assert report.data["train_images"] == 12
    assert 0 <= report.linear["trained"] <= 1
    assert (run / "report" / "report.json").is_file()
    assert state_of_process() == before


def test_what_cannot_be_trained_is_refused(settings, monkeypatch):
    config = settings("run")
    with pytest.raises(ConfigError, match=r"data.batchsize: .*did you mean.* batch_size"):
        dmtjepa.train(config, {"data.batchsize": 4})
    with pytest.raises(ConfigError, match=r"override 'data..x': write it as section.key"):
        dmtjepa.train("quickstart", {"data..x": 4})
    with ThreadPoolExecutor(1) as thread, pytest.raises(InterfaceError, match="in the main thread"):
        thread.submit(dmtjepa.train, config, device="cpu").result()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InterfaceError, match="RANK is set"):
        dmtjepa.train(config, device="cpu")
    monkeypatch.delenv("RANK")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(InterfaceError, match="destroy_process_group"):
            dmtjepa.train(config, device="cpu")
    finally:
        dist.destroy_process_group()
    assert not config.logging.path.exists()
