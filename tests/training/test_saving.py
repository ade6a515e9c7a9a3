"""Exports are made for every checkpoint that should have one, and a failure does not lose what is being written."""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmtjepa import checkpoint_format
from dmtjepa.checkpoint_format import CheckpointError
from dmtjepa.files import WRITING
from dmtjepa.interop import WeightsError, read_checkpoint
from dmtjepa.run_folder import RunFolder, open_run
from dmtjepa.training import checkpoint_writer, saving
from dmtjepa.training.launch import launch
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.step import TrainStep


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy of the folder of a finished run: step-00000016, and step-00000024 which is kept."""
    return Path(shutil.copytree(plain.logging.folder, tmp_path / "run"))


def exported_steps(folder) -> dict[str, int]:
    return {path.name: read_checkpoint(path)["step"] for path in folder.glob("*.pth.tar")}


@pytest.mark.slow
def test_a_start_makes_exports_that_a_killed_run_has_lost(folder, settings_in):
    for path in folder.glob("*.pth.tar"):
        path.rename(path.with_name(f"{WRITING}{path.name}-0123abcd"))
    assert launch(settings_in(folder), ["cpu"]) == 0
    assert exported_steps(folder) == {"jepa-latest.pth.tar": 24, "jepa-ep3.pth.tar": 24}
    assert not list(folder.glob(f"{WRITING}*"))


@pytest.mark.parametrize("state", ["missing", "earlier", "cut short"])
def test_exports_are_made_where_they_are_missing_old_or_damaged(folder, state):
    latest, epoch = folder / "jepa-latest.pth.tar", folder / "jepa-ep3.pth.tar"
    expected = torch.load(latest, weights_only=True)
    if state == "missing":
        latest.unlink()
        epoch.unlink()
    elif state == "earlier":
        earlier = expected | {"step": 16}
        torch.save(earlier, latest)
        epoch.unlink()
    else:
        for path in (latest, epoch):
            path.write_bytes(path.read_bytes()[:1000])
    run, _ = open_run(folder)
    saving.export_missing(run)
    assert exported_steps(folder) == {"jepa-latest.pth.tar": 24, "jepa-ep3.pth.tar": 24}
    for path in (latest, epoch):
        found = torch.load(path, weights_only=True)
        assert all(torch.equal(value, found["encoder"][name]) for name, value in expected["encoder"].items())


def test_exports_that_are_there_are_left_alone(folder, monkeypatch):
    run, _ = open_run(folder)
    monkeypatch.setattr(saving, "export_checkpoint", lambda *_: pytest.fail("exported again"))
    saving.export_missing(run)


def test_damaged_checkpoints_are_not_exported(folder, caplog):
    latest = folder / "jepa-latest.pth.tar"
    latest.unlink()
    path = next((folder / "checkpoints" / "step-00000024").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])
    run, _ = open_run(folder)
    saving.export_missing(run)
    assert "step-00000024 is damaged and not exported" in caplog.text
    assert exported_steps(folder) == {"jepa-latest.pth.tar": 16, "jepa-ep3.pth.tar": 24}


def test_an_export_from_a_folder_that_vanishes_is_explained(folder):
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"step-00000024 was written and is gone: was the run folder"):
        saving._export(folder / "checkpoints" / "step-00000024", [folder / "jepa-latest.pth.tar"])
    assert not folder.exists()


@pytest.mark.slow
def test_a_run_folder_that_vanishes_ends_the_run_and_is_not_made_again(settings, monkeypatch):
    """A folder of checkpoints without the settings of the run would be refused by the next start."""
    config = settings(**{"runtime.save_every_steps": 3})
    train_step = TrainStep.__call__

    def remove_before(self, batches, step):
        if step == 2:
            shutil.rmtree(config.logging.folder)
        return train_step(self, batches, step)

    monkeypatch.setattr(TrainStep, "__call__", remove_before)
    with pytest.raises(CheckpointError, match=r"run \(logging\.folder\) is gone"):
        launch(config, ["cpu"])
    assert not Path(config.logging.folder).exists()


@pytest.mark.slow
def test_full_disk_while_exporting_is_one_message_and_the_next_start_exports(settings, monkeypatch):
    config = settings(**{"optimization.epochs": 1, "optimization.warmup": 0})
    folder = Path(config.logging.folder)

    save = torch.save

    def fill_disk(values, file, **options):
        if ".pth.tar" in str(getattr(file, "name", "")):
            file.write(b"the first bytes")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(values, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_disk)
        with pytest.raises(CheckpointError, match=r"step-00000008 is complete, but its export failed.*No space left"):
            launch(config, ["cpu"])
    assert checkpoint_format.find_fault(folder / "checkpoints" / "step-00000008") is None
    assert exported_steps(folder) == {}
    assert not list(folder.glob(f"{WRITING}*"))
    assert launch(config, ["cpu"]) == 0
    assert exported_steps(folder) == {"jepa-latest.pth.tar": 8, "jepa-ep1.pth.tar": 8}


@pytest.mark.parametrize(
    ("number", "step", "exports"),
    [(signal.SIGUSR2, 8, 0), (signal.SIGTERM, 8, 2), (signal.SIGUSR2, 24, 2)],
    ids=["requeued", "stopped", "complete"],
)
def test_exports_are_left_to_the_next_start_of_a_job_that_is_requeued(monkeypatch, number, step, exports):
    """But not by a run that ends: it may have no next start."""
    made = []
    monkeypatch.setattr(saving, "_export", lambda checkpoint, paths: made.append(paths))
    monkeypatch.setattr(saving, "export_missing", made.append)
    signals = StopSignals()
    signals.received.append(number)
    saver = saving.Saver.__new__(saving.Saver)
    saver._folder = RunFolder(Path("run"), "jepa")
    saver._config = SimpleNamespace(runtime=SimpleNamespace(keep_every_epochs=1))
    saver._schedules = SimpleNamespace(steps_per_epoch=8, num_steps=24)
    saver._state = SimpleNamespace(step=step, tensors=dict, meta=lambda keep: {})
    saver._signals = signals
    saver._writer = SimpleNamespace(
        save=lambda tensors, meta, then: then(Path("checkpoint")), run_after=lambda work: work()
    )
    saver.save()
    saver.export_missing()
    assert len(made) == exports


def test_weights_that_are_not_finite_are_not_exported_and_do_not_end_the_run(folder, monkeypatch, caplog):
    def refuse(*_):
        raise WeightsError("encoder holds values that are not finite")

    monkeypatch.setattr(saving, "export_checkpoint", refuse)
    (folder / "jepa-latest.pth.tar").unlink()
    run, _ = open_run(folder)
    saving.export_missing(run)
    assert "not exported: encoder holds values" in caplog.text


@pytest.mark.slow
def test_a_failure_waits_for_the_checkpoint_that_is_being_written(settings, monkeypatch):
    """On a slow disk too: the checkpoint of step 3 is complete when the failure of the next step arrives."""
    config = settings(**{"runtime.save_every_steps": 3})
    describe, train_step = checkpoint_writer.describe_file, TrainStep.__call__

    def describe_slowly(path):
        time.sleep(0.3)
        return describe(path)

    def fail_after_saving(self, batches, step):
        if step == 3:
            raise RuntimeError("this step fails")
        return train_step(self, batches, step)

    monkeypatch.setattr(checkpoint_writer, "describe_file", describe_slowly)
    monkeypatch.setattr(TrainStep, "__call__", fail_after_saving)
    with pytest.raises(RuntimeError, match="this step fails"):
        launch(config, ["cpu"])
    checkpoints = Path(config.logging.folder, "checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]
    assert checkpoint_format.find_fault(checkpoints / "step-00000003") is None


@pytest.mark.slow
def test_a_failure_is_told_when_the_checkpoint_fails_too(settings, monkeypatch, caplog):
    config = settings(**{"runtime.save_every_steps": 3})
    train_step = TrainStep.__call__

    def fail_after_saving(self, batches, step):
        if step == 3:
            raise RuntimeError("this step fails")
        return train_step(self, batches, step)

    def fill_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "describe_file", fill_disk)
    monkeypatch.setattr(TrainStep, "__call__", fail_after_saving)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="this step fails"):
        launch(config, ["cpu"])
    assert "the checkpoint that was being written is lost, too" in caplog.text
