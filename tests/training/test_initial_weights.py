"""A new run can start from the weights of a checkpoint; a started one continues by itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dmtjepa.checkpoint_format import newest_whole
from dmtjepa.config import ConfigError
from dmtjepa.evaluation.subject import find_subject
from dmtjepa.interop import read_checkpoint
from dmtjepa.interop.sources import find_source
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.check import check_start, find_initial_weights
from dmtjepa.training.launch import launch


def final_step(config) -> dict:
    return torch.load(f"{config.logging.folder}/jepa-latest.pth.tar", weights_only=True)


@pytest.mark.slow
def test_a_run_starts_from_given_weights(settings, plain):
    """With no learning rate to speak of, the weights that a run ends with are those it started from."""
    given = f"{plain.logging.folder}/jepa-latest.pth.tar"
    still = {"optimization.lr": 1e-12, "optimization.start_lr": 0.0, "optimization.final_lr": 0.0,
             "optimization.epochs": 1, "optimization.ema": [1.0, 1.0]}  # fmt: skip
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": plain.logging.folder}, **still)
    assert launch(config, ["cpu"]) == 0
    expected = torch.load(given, weights_only=True)
    for part in ("encoder", "predictor", "target_encoder", "head", "target_head"):
        for name, value in final_step(config)[part].items():
            torch.testing.assert_close(value, expected[part][name], rtol=1e-5, atol=1e-6, msg=f"{part}.{name}")


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_first_export_has_weights(plain, tmp_path):
    """They are measured, exported and loaded from its newest checkpoint."""
    folder = tmp_path / "stopped"
    shutil.copytree(plain.logging.folder, folder, ignore=shutil.ignore_patterns("*.pth.tar"))
    checkpoint = find_subject(folder, has_images=False).checkpoint
    assert checkpoint == newest_whole(folder / "checkpoints")
    assert find_source(folder) == checkpoint
    found, exported = (
        dict(read_checkpoint(path)["target_encoder"])
        for path in (checkpoint, f"{plain.logging.folder}/jepa-latest.pth.tar")
    )
    torch.testing.assert_close(found, exported, rtol=0, atol=0)


def test_a_run_that_holds_no_weights_is_refused_by_name(settings, tmp_path):
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"meta.read_checkpoint: {tmp_path} is no run folder"):
        find_initial_weights(config, RunFolder.from_config(config))


def test_weights_that_are_not_there_are_named_as_they_were_given(settings, tmp_path, monkeypatch):
    """Not as a path below the run folder, where they are looked for, too; and with what is beside them."""
    monkeypatch.chdir(tmp_path)
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": "runs/a/jepa-ep9.pth.tar"})
    with pytest.raises(ConfigError, match=r"no runs/a/jepa-ep9\.pth\.tar, nor below logging\.folder; name a run"):
        check_start(config, 1, "cpu")
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/jepa-ep2.pth.tar").touch()
    with pytest.raises(ConfigError, match=r"logging\.folder; runs/a holds jepa-ep2\.pth\.tar$"):
        check_start(config, 1, "cpu")


@pytest.mark.parametrize("below", [False, True])
def test_a_run_that_holds_no_weights_is_not_said_to_be_missing(settings, tmp_path, monkeypatch, below):
    monkeypatch.chdir(tmp_path)
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": "old"})
    old = (Path(config.logging.folder) if below else tmp_path) / "old"
    old.mkdir(parents=True)
    (old / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"old holds no weights: no export, no checkpoint"):
        check_start(config, 1, "cpu")


@pytest.mark.slow
def test_an_official_file_that_asks_to_load_starts_afresh(settings, plain, losses):
    """The official files for ViT-L and H have `load_checkpoint: true` and no checkpoint."""
    config = settings(**{"meta.load_checkpoint": True})
    assert launch(config, ["cpu"]) == 0
    assert losses(config) == losses(plain)
