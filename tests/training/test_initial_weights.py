"""A new run can start from the weights of a checkpoint; a started one continues by itself."""

from __future__ import annotations

import pytest
import torch

from dmtjepa.training.launch import launch


def final_step(config) -> dict:
    return torch.load(f"{config.logging.folder}/jepa-latest.pth.tar", weights_only=True)


@pytest.mark.slow
def test_a_run_starts_from_given_weights(settings, plain):
    """With no learning rate to speak of, the weights that a run ends with are those it started from."""
    given = f"{plain.logging.folder}/jepa-latest.pth.tar"
    still = {"optimization.lr": 1e-12, "optimization.start_lr": 0.0, "optimization.final_lr": 0.0,
             "optimization.epochs": 1, "optimization.ema": [1.0, 1.0]}  # fmt: skip
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": given}, **still)
    assert launch(config, ["cpu"]) == 0
    expected = torch.load(given, weights_only=True)
    for part in ("encoder", "predictor", "target_encoder", "head", "target_head"):
        for name, value in final_step(config)[part].items():
            torch.testing.assert_close(value, expected[part][name], rtol=1e-5, atol=1e-6, msg=f"{part}.{name}")


@pytest.mark.slow
def test_an_official_file_that_asks_to_load_starts_afresh(settings, plain, losses):
    """The official files for ViT-L and H have `load_checkpoint: true` and no checkpoint."""
    config = settings(**{"meta.load_checkpoint": True})
    assert launch(config, ["cpu"]) == 0
    assert losses(config) == losses(plain)
