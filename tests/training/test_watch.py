"""A run that collapses warns, stops or goes back, on all ranks alike."""

import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import torch

from dmtjepa.objective import DMTJEPA
from dmtjepa.run_folder import RunFolder
from dmtjepa.training import instruments, watch
from dmtjepa.training.launch import launch, run_process
from dmtjepa.training.metrics import Metrics
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.watch import CollapsedRun, slow_down
from tests.helpers.ranks import run_ranks
from tests.helpers.record_histories import average_targets

SHORT = {
    "optimization.epochs": 4,
    "optimization.warmup": 0,
    "runtime.log_every": 2,
    "runtime.keep_last": 3,
    "meta.init_std": 0.2,  # images differ before the first step, too
}


@pytest.fixture
def collapse_after(monkeypatch):
    """collapse_after(10, 18) -> all targets of steps 10 to 17 are equal; a look is taken every 2 steps.

    broken: what becomes of targets instead, of targets and masks.
    """
    monkeypatch.setattr(instruments, "LOOK_EVERY", 2)

    def collapse(first, end=1000, broken=lambda targets, masks: torch.ones_like(targets)):
        original, count = DMTJEPA.compute_targets, 0

        def compute_targets(model, images, masks):
            nonlocal count
            count += 1
            targets = original(model, images, masks)
            return broken(targets, masks) if first < count <= end else targets

        monkeypatch.setattr(DMTJEPA, "compute_targets", compute_targets)

    return collapse


@pytest.fixture
def count_models(monkeypatch):
    """count_models() -> a list of how many models there are in each step; Python looks for no unused ones by itself."""

    def count():
        models, counts = weakref.WeakSet(), []
        original = DMTJEPA.loss

        def loss(model, *arguments):
            models.add(model)
            counts.append(len(models))
            return original(model, *arguments)

        monkeypatch.setattr(DMTJEPA, "loss", loss)
        gc.disable()
        return counts

    yield count
    gc.enable()


def steps_of(config):
    return [row["step"] + 1 for row in RunFolder.from_config(config).read_metrics()]


@pytest.mark.slow
def test_a_collapsed_run_warns_once_and_goes_on(settings, collapse_after, caplog, capsys):
    collapse_after(10)
    config = settings(**SHORT | {"optimization.epochs": 3})
    with caplog.at_level(logging.WARNING):
        assert launch(config, ["cpu"]) == 0
    (record,) = [record for record in caplog.records if "COLLAPSED" in record.message]
    assert "COLLAPSED at step 16" in record.message
    assert "optimization.lr" in record.message
    assert steps_of(config)[-1] == 24
    assert "COLLAPSED at step 24" in capsys.readouterr().err


@pytest.mark.slow
def test_a_collapsed_run_is_saved_and_stopped(settings, collapse_after):
    collapse_after(10)
    config = settings(**SHORT | {"runtime.on_collapse": "stop"})
    with pytest.raises(CollapsedRun, match=r"COLLAPSED at step 16.*saved and stopped.*on_collapse: warn"):
        launch(config, ["cpu"])
    # Found in the look after step 16, voted on in step 17, known to all ranks in step 18.
    assert RunFolder.from_config(config).checkpoints.joinpath("step-00000018").is_dir()


@pytest.mark.slow
def test_a_run_of_ijepa_whose_targets_are_constant_in_an_image_is_stopped(settings, collapse_after):
    collapse_after(10, broken=average_targets)
    config = settings(**SHORT | {"runtime.on_collapse": "stop", "patch.local_agg_head": False})
    with pytest.raises(CollapsedRun, match=r"COLLAPSED to a constant for each image at step 16.*saved and stopped"):
        launch(config, ["cpu"])


@pytest.mark.slow
def test_a_collapsed_run_goes_back_and_learns_more_slowly(settings, losses, collapse_after, count_models, caplog):
    collapse_after(10, 18)
    config = settings(**SHORT | {"runtime.on_collapse": "rollback"})
    models = count_models()
    with caplog.at_level(logging.WARNING):
        assert launch(config, ["cpu"]) == 0
    assert max(models) == 1  # the first is freed before the second is built
    assert "back to step 8" in caplog.text
    (rollback,) = json.loads(Path(config.logging.folder, "rollbacks.json").read_text())
    assert (rollback["from_step"], rollback["to_step"]) == (16, 8)
    assert len(losses(config)) == 32
    assert steps_of(config) == sorted(set(steps_of(config)))  # rows of the steps that were undone are gone
    rates = [row["train/lr"] for row in RunFolder.from_config(config).read_metrics()]
    assert rates[4] < 0.6 * rates[3]  # after step 8
    start = RunFolder.from_config(config).read_starts()[-1]
    assert start["step"] == 8


@pytest.mark.slow
def test_a_run_that_was_killed_amid_a_collapse_goes_back_before_it(settings, collapse_after, monkeypatch, caplog):
    collapse_after(10, 19)
    config = settings(**SHORT | {"runtime.on_collapse": "rollback", "runtime.save_every_steps": 7})
    record = Metrics.record

    def failing(metrics, batch, *values):
        if batch.step == 14:
            raise RuntimeError("failed on purpose")
        record(metrics, batch, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "record", failing)
        with pytest.raises(RuntimeError, match="on purpose"):
            launch(config, ["cpu"])
    with caplog.at_level(logging.INFO):
        assert launch(config, ["cpu"]) == 0
    assert RunFolder.from_config(config).read_starts()[1]["step"] == 14  # two looks had shown it
    assert "back to step 8" in caplog.text


@pytest.mark.slow
def test_a_rollback_that_a_kill_interrupts_counts_once(settings, collapse_after, monkeypatch):
    collapse_after(10, 20)
    config = settings(**SHORT | {"runtime.on_collapse": "rollback"})

    def failing(checkpoint):
        raise RuntimeError("failed on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "discard", failing)
        with pytest.raises(RuntimeError, match="on purpose"):
            launch(config, ["cpu"])
    assert launch(config, ["cpu"]) == 0
    (rollback,) = RunFolder.from_config(config).read_rollbacks()
    assert rollback["to_step"] == 8
    assert RunFolder.from_config(config).read_starts()[1]["step"] == 16


@pytest.mark.slow
def test_without_a_good_checkpoint_a_run_stops(settings, collapse_after):
    collapse_after(3)
    config = settings(**SHORT | {"runtime.on_collapse": "rollback"})
    with pytest.raises(CollapsedRun, match="no checkpoint of step 2 or earlier"):
        launch(config, ["cpu"])


def train_collapsing(config):
    """Train as one of several ranks: all targets are equal from step 10 on."""
    instruments.LOOK_EVERY = 2
    original, counts = DMTJEPA.compute_targets, []

    def compute_targets(*arguments):
        counts.append(None)
        targets = original(*arguments)
        return torch.ones_like(targets) if len(counts) > 10 else targets

    DMTJEPA.compute_targets = compute_targets
    run_process(config, "cpu")


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(settings, tmp_path):
    config = settings(**SHORT | {"runtime.on_collapse": "stop", "data.batch_size": 8})
    ends = run_ranks(train_collapsing, 2, tmp_path, config)
    assert [code for code, _ in ends] == [1, 1]
    assert all("COLLAPSED at step 16" in text for _, text in ends)
    assert RunFolder.from_config(config).checkpoints.joinpath("step-00000018").is_dir()


def test_each_rollback_halves_the_learning_rate():
    schedules = Schedules(10, 5, 1, 1e-4, 1e-3, 1e-5, 0.0, 0.0, (1.0, 1.0))
    slow = slow_down(schedules, 2)
    assert [slow.learning_rate(step) for step in range(50)] == pytest.approx(
        [schedules.learning_rate(step) / 4 for step in range(50)]
    )
    assert slow_down(schedules, 0) == schedules
