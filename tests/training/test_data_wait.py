"""Data are there when they are needed, and a run that waits for them says so, once, with advice."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmtjepa.config import MaskSettings
from dmtjepa.data.loaders.pil import PilLoader
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.batches import BatchStream
from dmtjepa.training.launch import launch
from dmtjepa.training.metrics import WAIT_STEPS, Metrics, StepRecord, StepValues
from dmtjepa.training.saving import Saver
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.step import TrainStep


def steps(count: int, waited: float) -> list[StepValues]:
    """Steps of a second each, `waited` of it without data."""
    numbers = torch.zeros(())
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {"loss": numbers, "norm": numbers}
    record = StepRecord(**values)
    return [StepValues(record, 1.0, 1.0, 1.0, waited)] * count


def warnings_of(folder: Path, caplog, blocks: list[list[StepValues]], rank: int = 0) -> list[str]:
    folder.mkdir()
    schedules = Schedules(100, 10, 0, 0.0, 1.0, 0.0, 0.0, 0.0, (1.0, 1.0))
    metrics = Metrics(
        RunFolder(folder, "jepa"), rank, torch.device("cpu"), schedules=schedules, first_step=0, global_batch=8
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for block in blocks:
            metrics._write(block)
    metrics.close()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("rank", [0, 3])
def test_waiting_is_told_of_once_with_advice(tmp_path: Path, caplog, rank: int):
    blocks = [steps(WAIT_STEPS, 0.01), *[steps(WAIT_STEPS // 2, 0.2)] * 6]
    said = warnings_of(tmp_path / "a", caplog, blocks, rank)
    assert len(said) == 1
    assert said[0].startswith(f"rank {rank}: 20% of the time goes by waiting for data. Raise data.num_workers")


def test_slow_first_steps_and_short_waits_are_not(tmp_path: Path, caplog):
    assert warnings_of(tmp_path / "a", caplog, [steps(WAIT_STEPS, 0.9), *[steps(WAIT_STEPS, 0.04)] * 3]) == []
    assert warnings_of(tmp_path / "b", caplog, [steps(WAIT_STEPS, 0.9)]) == []


@pytest.mark.slow
def test_the_next_batch_is_fetched_before_the_host_waits_for_the_device(settings, monkeypatch):
    """Of a step that is logged, too: its losses are read after the next batch is on its way."""
    events: list[str] = []
    next_batches, train_step, flush, save = PilLoader.epoch, TrainStep.__call__, Metrics.flush, Saver.save

    def watched_epoch(loader, *arguments):
        for images in next_batches(loader, *arguments):
            events.append("fetch")
            yield images

    def watch(name, function):
        return lambda *arguments: events.append(name) or function(*arguments)

    monkeypatch.setattr(PilLoader, "epoch", watched_epoch)
    monkeypatch.setattr(TrainStep, "__call__", watch("train", train_step))
    monkeypatch.setattr(Metrics, "flush", watch("flush", flush))
    monkeypatch.setattr(Saver, "save", watch("save", save))
    config = settings(**{"runtime.log_every": 1, "runtime.save_every_steps": 3, "optimization.epochs": 1})
    assert launch(config, ["cpu"]) == 0
    plain, saving = ["fetch", "flush"], ["flush", "save", "fetch"]  # what was due is saved before more data are wanted
    between = [plain, plain, saving, plain, plain, saving, plain]
    assert events == ["fetch", *(e for part in between for e in ("train", *part)), "train", "flush", "save"]


@pytest.mark.slow
def test_the_reported_share_is_that_of_waiting_for_the_loader(settings, monkeypatch):
    """On a clock that only the loader moves, all time is waiting for data; moved by step and logging, none is."""

    def share(**advances: float) -> float:
        clock = [0.0]
        monkeypatch.setattr("dmtjepa.training.stopwatch.time.perf_counter", lambda: clock[0])

        def advanced(name, function):
            def call(*arguments):
                clock[0] += advances.get(name, 0.0)
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(PilLoader, "_receive", advanced("loader", PilLoader._receive))
            patch.setattr(TrainStep, "__call__", advanced("step", TrainStep.__call__))
            patch.setattr(Metrics, "_write", advanced("log", Metrics._write))
            config = settings("-".join(advances), **{"runtime.log_every": 2, "optimization.epochs": 1})
            assert launch(config, ["cpu"]) == 0
        board = EventAccumulator(str(Path(config.logging.folder, "tensorboard"))).Reload()
        shares = {event.value for event in board.Scalars("train/data_wait")}
        assert len(shares) == 1
        return shares.pop()

    assert share(loader=1.0) == 1
    assert share(step=1.0, log=5.0) == 0
    assert share(step=3.0, loader=1.0) == pytest.approx(0.25)


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_that_was_copied_aside_is_kept_for_the_main_stream(monkeypatch, packed: bool):
    """What the copying stream has allocated must not be used again while the main stream reads it."""
    current, kept = FakeStream(), []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((id(tensor), stream)))

    def sample(step: int, micro_batch: int) -> MaskBatch:
        return MaskSampler(MaskSettings(min_keep=2, pack=packed), (6, 6), 2).sample(step)

    class Loader:
        def epoch(self, epoch, start_step):
            yield torch.zeros(2, 3, 96, 96, dtype=torch.uint8)

    stream = BatchStream(Loader(), sample, lambda: 0.0, torch.device("cpu"), steps_per_epoch=1, accumulation=1)
    stream._copies = FakeStream()
    (batch,) = stream.steps(0, 1)
    ((images, masks),) = batch.micro_batches
    tensors = [images]
    masks._map(tensors.append)
    assert len(tensors) == (15 if packed else 6)
    assert kept == [(id(tensor), current) for tensor in tensors]
