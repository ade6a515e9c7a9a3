"""A run that waits for data says so, once, with advice."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dmtjepa.training.metrics import WAIT_STEPS, Metrics, StepRecord, StepValues


def steps(count: int, waited: float) -> list[StepValues]:
    """Steps of a second each, `waited` of it without data."""
    numbers = torch.zeros(())
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0) | {"loss": numbers, "norm": numbers}
    record = StepRecord(**values)
    return [StepValues(record, 1.0, 1.0, 1.0, waited)] * count


def warnings_of(folder: Path, caplog, blocks: list[list[StepValues]]) -> list[str]:
    folder.mkdir()
    metrics = Metrics(
        folder, "jepa", 0, torch.device("cpu"), num_steps=1000, first_step=0, steps_per_epoch=100, global_batch=8
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for block in blocks:
            metrics._write(block)
    metrics.close()
    return [record.getMessage() for record in caplog.records]


def test_waiting_is_told_of_once_with_advice(tmp_path: Path, caplog):
    said = warnings_of(tmp_path / "a", caplog, [steps(WAIT_STEPS, 0.01), *[steps(WAIT_STEPS // 2, 0.2)] * 6])
    assert len(said) == 1
    assert said[0].startswith("20% of the time goes by waiting for data. Raise data.num_workers")


def test_slow_first_steps_and_short_waits_are_not(tmp_path: Path, caplog):
    assert warnings_of(tmp_path / "a", caplog, [steps(WAIT_STEPS, 0.9), *[steps(WAIT_STEPS, 0.04)] * 3]) == []
    assert warnings_of(tmp_path / "b", caplog, [steps(WAIT_STEPS, 0.9)]) == []
