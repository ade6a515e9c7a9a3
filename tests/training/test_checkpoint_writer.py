"""The checkpoints of a run: what is in them, what is kept, and what a changed data set does."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dmtjepa import checkpoint_format
from dmtjepa.cli.weights import main
from dmtjepa.training.launch import launch


@pytest.fixture
def checkpoints(plain, tmp_path) -> Path:
    """A copy of the checkpoints of a finished run: step-00000016 and step-00000024."""
    return Path(shutil.copytree(Path(plain.logging.folder, "checkpoints"), tmp_path / "checkpoints"))


def flip(folder):
    path = next(folder.glob("*.distcp"))
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.slow
def test_epoch_and_step_in_a_name_are_what_is_inside(plain):
    folder = Path(plain.logging.folder, "checkpoints")
    for path in checkpoint_format.list_checkpoints(folder):
        meta = checkpoint_format.read_meta(path)
        assert meta["step"] == checkpoint_format.step_of(path)
        assert meta["epoch"] == meta["step"] // 8
        assert meta["optimizer_steps"] == meta["step"]


@pytest.mark.slow
def test_last_n_and_every_mth_epoch_are_kept(settings):
    config = settings(**{"optimization.epochs": 5, "runtime.keep_last": 1, "runtime.keep_every_epochs": 2})
    assert launch(config, ["cpu"]) == 0
    folder = Path(config.logging.folder)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000016", "step-00000032", "step-00000040"]
    exports = sorted(path.name for path in folder.glob("*.pth.tar"))
    assert exports == ["jepa-ep2.pth.tar", "jepa-ep4.pth.tar", "jepa-ep5.pth.tar", "jepa-latest.pth.tar"]


def test_command_verifies_and_exports(checkpoints, tmp_path, capsys):
    assert main(["verify", str(checkpoints)]) == 0
    assert "step-00000024 is whole: step 24" in capsys.readouterr().out
    newest = str(checkpoints / "step-00000024")
    assert main(["export", newest, "--format", "official", "--out", str(tmp_path / "out.pth.tar")]) == 0
    exported = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert exported["step"] == 24
    assert exported["opt"]["state"]
    flip(checkpoints / "step-00000016")
    for command in ("verify", "show"):
        assert main([command, str(checkpoints / "step-00000016")]) == 1
        assert "has other contents" in capsys.readouterr().err


def test_data_set_that_changed_is_an_error(plain, settings_in, tmp_path):
    folder = Path(shutil.copytree(plain.logging.folder, tmp_path / "run"))
    newest = checkpoint_format.newest_whole(folder / "checkpoints")
    meta = checkpoint_format.read_meta(newest) | {"steps_per_epoch": 9, "num_images": 150}
    (newest / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["meta.json"] = checkpoint_format.describe_file(newest / "meta.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint_format.CheckpointError, match=r"9 steps per epoch of 150 images.*has changed"):
        launch(settings_in(folder), ["cpu"])


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_written(plain, settings_in, tmp_path):
    """The run does not start again from step 0, which would overwrite its losses and remove its checkpoints."""
    folder = Path(shutil.copytree(plain.logging.folder, tmp_path / "run"))
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(checkpoint)
    csv = (folder / "jepa_r0.csv").read_text()
    with pytest.raises(checkpoint_format.CheckpointError, match=r"all checkpoints in .* are damaged"):
        launch(settings_in(folder), ["cpu"])
    assert (folder / "jepa_r0.csv").read_text() == csv
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000016", "step-00000024"]
