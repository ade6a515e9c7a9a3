"""What tells a whole checkpoint from a torn one, and what is kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dmtjepa import checkpoint_format
from dmtjepa.interop.__main__ import main
from dmtjepa.training.launch import launch


@pytest.fixture
def checkpoints(plain, tmp_path) -> Path:
    """A copy of the checkpoints of a finished run: step-00000016 and step-00000024."""
    return Path(shutil.copytree(Path(plain.logging.folder, "checkpoints"), tmp_path / "checkpoints"))


def cut(folder):
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    path = next(folder.glob("*.distcp"))
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "half-manifest": (lambda folder: (folder / "manifest.json").write_text('{"format": 1, '), "cannot be read"),
    "other-json": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    "format": (lambda folder: (folder / "manifest.json").write_text('{"format": 99, "files": {}}'), "format is 99"),
    "cut": (cut, "bytes instead of"),
    "flip": (flip, "other contents"),
    "missing": (lambda folder: next(folder.glob("*.distcp")).unlink(), "is missing"),
    "metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_recognised_and_passed_over(checkpoints, damage, caplog):
    work, message = DAMAGES[damage]
    newest = checkpoints / "step-00000024"
    assert checkpoint_format.newest_whole(checkpoints) == newest
    work(newest)
    assert message in checkpoint_format.find_fault(newest)
    assert checkpoint_format.newest_whole(checkpoints) == checkpoints / "step-00000016"
    assert "step-00000024 is damaged and passed over" in caplog.text


def test_renamed_checkpoint_is_not_what_its_name_says(checkpoints):
    renamed = (checkpoints / "step-00000016").rename(checkpoints / "step-00000099")
    assert "name says step 99 and its manifest step 16" in checkpoint_format.find_fault(renamed)


def test_half_written_checkpoint_is_not_seen_and_is_removed(checkpoints):
    (checkpoints / "step-00000024").rename(checkpoints / ".writing-step-00000024")
    assert checkpoint_format.newest_whole(checkpoints).name == "step-00000016"
    checkpoint_format.remove_leftovers(checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000016"]


def test_epoch_and_step_in_a_name_are_what_is_inside(plain):
    folder = Path(plain.logging.folder, "checkpoints")
    for path in checkpoint_format.list_checkpoints(folder):
        meta = checkpoint_format.read_meta(path)
        assert meta["step"] == checkpoint_format.step_of(path)
        assert meta["epoch"] == meta["step"] // 8
        assert meta["optimizer_steps"] == meta["step"]


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


def test_data_set_that_changed_is_an_error(settings):
    config = settings(**{"optimization.epochs": 2})
    assert launch(config, ["cpu"]) == 0
    newest = checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints"))
    meta = checkpoint_format.read_meta(newest) | {"steps_per_epoch": 9, "num_images": 150}
    (newest / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"].pop("meta.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint_format.CheckpointError, match=r"9 steps per epoch of 150 images.*has changed"):
        launch(config, ["cpu"])
