"""Losses reach the CSV and TensorBoard, and a run whose logs cannot be written goes on."""

import errno
import io
import os
import re
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from dmtjepa.metrics_file import read_metrics
from dmtjepa.run_folder import RunFolder
from dmtjepa.step_csv import read_losses
from dmtjepa.training.launch import launch
from dmtjepa.training.metrics import BAR_FORMAT, Metrics, StepRecord, StepValues, show_figures
from dmtjepa.training.schedules import Schedules
from tests.helpers.streams import BrokenPipe


def finished(step):
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {"loss": torch.zeros(()), "norm": torch.zeros(())}
    return StepValues(StepRecord(**values | {"step": step, "step_in_epoch": step}), step / 2, 1.0, 1.0, 0.0)


def test_what_a_full_disk_refuses_is_written_later(tmp_path, monkeypatch):
    schedules = Schedules(100, 10, 0, 0.0, 1.0, 0.0, 0.0, 0.0, (1.0, 1.0))
    folder = RunFolder(tmp_path, "jepa")
    metrics = Metrics(folder, 0, torch.device("cpu"), schedules=schedules, first_step=0, global_batch=8)

    def refuse(descriptor, block):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics._write([finished(0)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        metrics._write([finished(1)])
        metrics._write([finished(2)])
        assert read_losses(folder.csv_file(0)).loss.tolist() == [0]
    metrics._write([finished(3)])
    metrics.close()
    assert read_losses(folder.csv_file(0)).loss.tolist() == [0, 0.5, 1, 1.5]
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(0, 0), (1, 0.5), (2, 1), (3, 1.5)]


def test_a_later_start_hides_the_steps_that_it_repeats(tmp_path):
    schedules = Schedules(100, 10, 0, 0.0, 1.0, 0.0, 0.0, 0.0, (1.0, 1.0))
    folder = RunFolder(tmp_path, "jepa")
    for first, last in ((0, 6), (4, 8)):
        metrics = Metrics(folder, 0, torch.device("cpu"), schedules=schedules, first_step=first, global_batch=8)
        metrics._write([finished(step) for step in range(first, last)])
        metrics.close()
        if first == 0:  # the file of a start in the same second has the same name
            next(folder.tensorboard.iterdir()).rename(folder.tensorboard / "events.out.tfevents.0")
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(8))


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, ["loss=0.2571", "images/s=865"]),
        (60, []),
        (120, ["loss=0.2571", "images/s=865", "data wait=3%", "explained=45%", "rank=9.8"]),
    ],
)
def test_a_narrow_terminal_keeps_its_progress_bar(columns, shown):
    figures = {"loss": "0.2571", "images/s": "865", "data wait": "3%", "explained": "45%", "rank": "9.8"}
    terminal = io.StringIO()
    with tqdm(total=100_000, initial=50_000, ncols=columns, ascii=" #", bar_format=BAR_FORMAT, file=terminal) as bar:
        bar.set_description("epoch 12", refresh=False)
        show_figures(bar, figures)
    line = terminal.getvalue().split("\r")[-1].rstrip("\n")
    assert len(line) <= columns
    assert line.count("#") >= 5  # of at least ten characters, one half
    assert re.findall(r"[a-z/ ]+=[\d.%]+", line.replace(", ", ",")) == shown


@pytest.mark.slow
def test_a_run_goes_on_without_standard_error(settings, losses, monkeypatch):
    config = settings(**{"optimization.epochs": 1, "optimization.warmup": 0})
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    assert launch(config, ["cpu"]) == 0
    assert len(losses(config)) == 8


@pytest.mark.slow
def test_a_start_on_a_full_disk_says_so(settings, monkeypatch):
    config = settings()

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dmtjepa.run_folder.write_json", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to: .*No space left on device"):
        launch(config, ["cpu"])


def test_values_reach_the_metrics_and_tensorboard(tmp_path):
    schedules = Schedules(100, 10, 0, 0.0, 1.0, 0.0, 0.0, 0.0, (1.0, 1.0))
    folder = RunFolder(tmp_path, "jepa")
    for rank in (0, 1):
        metrics = Metrics(folder, rank, torch.device("cpu"), schedules=schedules, first_step=0, global_batch=8)
        metrics.write_values(3, {"eval/linear": 0.5 + rank})
        metrics.close()
    assert read_metrics(folder.metrics_file) == [{"step": 3, "eval/linear": 0.5}]
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("eval/linear")] == [(3, 0.5)]
