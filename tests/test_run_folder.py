"""A run folder is locked by one run, refuses another one, and names its files in one place."""

import json

import pytest
import torch

from dmtjepa.config import parse_config
from dmtjepa.files import WRITING
from dmtjepa.run_folder import RunFolder, RunFolderError, open_run


def make_config(folder, **sections):
    return parse_config({"logging": {"folder": str(folder), "write_tag": "tiny"}, **sections})


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has started once, with a global batch of 512."""
    config = make_config(tmp_path / "run")
    run = RunFolder.from_config(config)
    run.path.mkdir()
    run.write_config(config)
    run.add_start(torch.device("cpu"), world_size=2, global_batch=512, step=0)
    return run


def test_settings_are_read_again(run):
    opened, config = open_run(run.path)
    assert opened == run
    assert config == make_config(run.path)
    assert opened.latest_export == run.path / "tiny-latest.pth.tar"
    assert opened.epoch_export(50) == run.path / "tiny-ep50.pth.tar"
    assert opened.csv_file(3) == run.path / "tiny_r3.csv"


def test_another_folder_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="does not exist"):
        open_run(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"holds no config\.yaml; give a run folder"):
        open_run(tmp_path)


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


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"starts": 3}', '{"starts": [3]}'])
def test_an_environment_that_cannot_be_read_does_not_block_the_run(run, contents):
    run.environment_file.write_text(contents)
    run.check(make_config(run.path), global_batch=512)
    run.add_start(torch.device("cpu"), world_size=1, global_batch=512, step=8)
    (start,) = json.loads(run.environment_file.read_text())["starts"]
    assert (start["step"], start["processes"], start["global_batch"]) == (8, 1, 512)


def test_leftovers_of_a_killed_run_are_removed(run):
    (run.path / f"{WRITING}tiny-latest.pth.tar-1234").write_text("half")
    (run.checkpoints / f"{WRITING}step-00000008").mkdir(parents=True)
    before = {run.config_file, run.environment_file, run.checkpoints}
    run.remove_leftovers()
    assert set(run.path.iterdir()) == before
    assert not list(run.checkpoints.iterdir())


def test_a_folder_is_locked_by_one_run(run):
    with run.locked(), pytest.raises(RunFolderError, match="being written by another run"), run.locked():
        pass
    with run.locked():
        pass
