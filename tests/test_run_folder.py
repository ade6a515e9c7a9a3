"""A run folder is locked by one run, refuses another one, and names its files in one place."""

import contextlib
import json
import os
import socket
import time

import pytest
import torch

from dmtjepa.config import parse_config
from dmtjepa.files import WRITING
from dmtjepa.run_folder import RunFolder, RunFolderError, open_run


def make_config(folder, **sections):
    return parse_config({"logging": {"folder": str(folder), "write_tag": "tiny"}, **sections})


def start(run, config, *, global_batch=512, step=0):
    run.record_start(config, torch.device("cpu"), world_size=2, global_batch=global_batch, step=step)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has made a step of a global batch of 512."""
    config = make_config(tmp_path / "run")
    run = RunFolder.from_config(config)
    run.path.mkdir()
    start(run, config)
    with contextlib.closing(run.open_csv(0, first_step=0, steps_per_epoch=8)) as csv:
        csv.write(0, 0, 0.5, 30.0, 8.0, 0.1)
    return run


def test_settings_are_read_again(run):
    opened, config = open_run(run.path)
    assert opened == run
    assert config == make_config(run.path)
    assert opened.latest_export == run.path / "tiny-latest.pth.tar"
    assert opened.epoch_export(50) == run.path / "tiny-ep50.pth.tar"
    assert opened.csv_file(3) == run.path / "tiny_r3.csv"


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("run/tiny-latest.pth.tar", True),
        ("link/tiny-best.pth.tar", True),
        ("run/tiny-ep3.pth.tar", True),
        ("run/checkpoints/step-4", True),
        ("run/checkpoints/4", False),
        ("run/tiny-ep.pth.tar", False),
        ("run/tiny-best-2.pth.tar", False),
        ("run/jepa-latest.pth.tar", False),
        ("tiny-latest.pth.tar", False),
        ("other/checkpoints/step-4", False),
    ],
)
def test_weights_of_the_run_are_told_by_their_place_and_name(tmp_path, name, held):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert RunFolder(tmp_path / "run", "tiny").holds(tmp_path / name) == held


def test_another_folder_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="does not exist"):
        open_run(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"holds no config\.yaml; give a run folder"):
        open_run(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunFolderError, match=rf"report holds no config\.yaml; give a run folder, such as {tmp_path}$"):
        open_run(tmp_path / "report")
    with pytest.raises(RunFolderError, match=r"config\.yaml is a file; give a run folder"):
        open_run(tmp_path / "config.yaml")


def test_more_epochs_are_a_new_run_that_starts_from_the_old_one(run):
    longer = make_config(run.path, optimization={"epochs": 400})
    with pytest.raises(RunFolderError) as error:
        run.check(longer, global_batch=512)
    assert "To train longer" not in str(error.value)  # there is nothing to start from yet
    run.latest_export.touch()
    with pytest.raises(RunFolderError, match=r"optimization\.epochs: 300 there, 400 now") as error:
        run.check(longer, global_batch=512)
    assert "To train longer than a schedule that has ended, start a new run" in str(error.value)
    assert f"meta.read_checkpoint={run.latest_export}" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime": {"precision": "bfloat16", "keep_last": 9, "attention": "sdpa"}},
        {"data": {"batch_size": 64, "num_workers": 1}, "runtime": {"accumulation": 4}},  # at the same global batch
        {"evaluation": {"batch_size": 2}, "optimization": {"max_skipped_steps": 3}},
    ],
)
def test_free_settings_may_change(run, changes):
    run.check(make_config(run.path, **changes), global_batch=512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": {"seed": 3}}, "runtime.seed: 0 there, 3 now"),
        ({"runtime": {"teacher_precision": "fp8"}}, "runtime.teacher_precision: same there, fp8 now"),
        ({"optimization": {"lr": 0.5}}, "optimization.lr: 0.001 there, 0.5 now"),
    ],
)
def test_settings_that_change_what_is_trained_may_not(run, changes, message):
    with pytest.raises(RunFolderError, match="holds a run with other settings") as error:
        run.check(make_config(run.path, **changes), global_batch=512)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 1


def test_the_global_batch_may_not_change(run):
    with pytest.raises(RunFolderError, match=r"global batch .*: 512 there, 1024 now"):
        run.check(make_config(run.path, runtime={"accumulation": 2}), global_batch=1024)


def test_a_run_that_never_made_a_step_may_start_anew(tmp_path):
    config = make_config(tmp_path / "run")
    run = RunFolder.from_config(config)
    run.path.mkdir()
    start(run, config, global_batch=512)
    run.open_csv(0, first_step=0, steps_per_epoch=8).close()  # a header alone
    changed = make_config(tmp_path / "run", optimization={"lr": 0.5}, data={"image_folder": "corrected"})
    run.check(changed, global_batch=256)
    start(run, changed, global_batch=256)
    assert run.read_config() == changed
    with contextlib.closing(run.open_csv(0, first_step=0, steps_per_epoch=8)) as csv:
        csv.write(0, 0, 0.5, 30.0, 8.0, 0.1)
    run.check(changed, global_batch=256)
    with pytest.raises(RunFolderError, match="holds a run with other settings"):
        run.check(config, global_batch=256)
    with pytest.raises(RunFolderError, match=r"global batch .*: 256 there, 512 now"):
        run.check(changed, global_batch=512)


@pytest.mark.parametrize("name", ["checkpoints/step-00000008", "tiny-latest.pth.tar"])
def test_a_run_with_a_checkpoint_has_made_steps(tmp_path, name):
    run = RunFolder.from_config(make_config(tmp_path))
    start(run, make_config(tmp_path))
    assert not run.has_trained()
    (tmp_path / name).mkdir(parents=True)
    assert run.has_trained()


def test_settings_follow_a_resume_and_the_earlier_ones_are_kept(run):
    changed = make_config(run.path, data={"root_path": "/moved"}, runtime={"keep_last": 5})
    start(run, changed, step=8)
    assert run.read_config() == changed
    first, second = run.read_starts()
    assert first["changed_settings"] == {}
    assert second["changed_settings"] == {
        "data.root_path": {"from": "", "to": "/moved"},
        "runtime.keep_last": {"from": 2, "to": 5},
    }


def test_a_folder_that_cannot_be_written_is_refused_before_it_is_made(tmp_path):
    (tmp_path / "file").touch()
    config = make_config(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match=r"logging\.folder\) cannot be written to: .*file is not a folder"):
        RunFolder.from_config(config).check(config, global_batch=512)


def test_a_folder_of_checkpoints_that_cannot_be_written_is_refused_before_a_step_is_trained(run):
    run.checkpoints.touch()  # stands in for one without permission, which root has everywhere
    with pytest.raises(RunFolderError, match=r"cannot be written to: .*/checkpoints is not a folder"):
        run.check(make_config(run.path), global_batch=512)


def test_whether_a_run_is_active_can_be_asked(run):
    run.check_unlocked()
    with run.locked(), pytest.raises(RunFolderError, match="being written by another run"):
        run.check_unlocked()
    run.check_unlocked()


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"starts": 3}', '{"starts": [3]}'])
def test_an_environment_that_cannot_be_read_does_not_block_the_run(run, contents):
    run.environment_file.write_text(contents)
    run.check(make_config(run.path), global_batch=512)
    start(run, make_config(run.path), step=8)
    (row,) = json.loads(run.environment_file.read_text())["starts"]
    assert (row["step"], row["processes"], row["global_batch"]) == (8, 2, 512)


def test_leftovers_of_a_killed_run_are_removed(run):
    (run.path / f"{WRITING}tiny-latest.pth.tar-1234").write_text("half")
    (run.checkpoints / f"{WRITING}step-00000008").mkdir(parents=True)
    before = {run.config_file, run.environment_file, run.csv_file(0), run.checkpoints}
    run.remove_leftovers()
    assert set(run.path.iterdir()) == before
    assert not list(run.checkpoints.iterdir())


def test_a_folder_is_locked_by_one_run(run):
    with run.locked(), pytest.raises(RunFolderError, match="being written by another run"), run.locked():
        pass
    with run.locked():
        pass
    assert run.path.joinpath(".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_who_holds_the_lock_is_said_and_kept(run, monkeypatch):
    holder = rf"another run \(process {os.getpid()} on {socket.gethostname()}, SLURM job 77\); choose"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with run.locked():
        for job in ("78", "79"):  # what is refused changes nothing
            monkeypatch.setenv("SLURM_JOB_ID", job)
            with pytest.raises(RunFolderError, match=holder), run.locked():
                pass
            with pytest.raises(RunFolderError, match=holder):
                run.check_unlocked()


@pytest.mark.parametrize("freed", [True, False])
def test_a_requeued_job_waits_for_the_lock_of_a_lost_node(run, monkeypatch, caplog, freed):
    waits = []
    with contextlib.ExitStack() as lost:
        lost.enter_context(run.locked())

        def wait(seconds):
            waits.append(seconds)
            if freed and len(waits) == 5:
                lost.close()

        monkeypatch.setattr(time, "sleep", wait)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        refused = contextlib.nullcontext() if freed else pytest.raises(RunFolderError, match="by another run")
        with refused, run.locked():
            pass
    assert sum(waits) == (100 if freed else 300)
    assert f"(process {os.getpid()} on {socket.gethostname()}); waiting up to 300 s" in caplog.text
