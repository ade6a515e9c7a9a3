"""The loop on a GPU: bfloat16, compiled blocks, Triton kernels, NCCL."""

import math
from pathlib import Path

import pytest
import torch

from dmtjepa.training import checkpoint
from dmtjepa.training.launch import launch
from dmtjepa.training.loop import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_trains_as_on_the_cpu_up_to_bfloat16(plain, settings, losses, compiled):
    config = settings(**{"runtime.compile": compiled})
    assert launch(config, ["cuda:0"]) == 0
    torch.testing.assert_close(losses(config), losses(plain), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("changes", [{}, {"mask.pack": True}, {"runtime.teacher_precision": "fp8"}], ids=str)
def test_no_step_between_two_logged_ones_waits_for_the_device(settings, losses, monkeypatch, changes):
    if changes.get("runtime.teacher_precision") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    original = Trainer.train_step

    def train_step(trainer, batches):
        if trainer.step < 2:  # the first steps create what later ones use
            return original(trainer, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(trainer, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    config = settings(**{"runtime.compile": "off"} | changes)
    assert launch(config, ["cuda:0"]) == 0
    assert all(map(math.isfinite, losses(config)))


def test_resumes_from_a_checkpoint_of_the_gpu(settings, losses):
    config = settings(**{"runtime.keep_last": 5})
    assert launch(config, ["cuda:0"]) == 0
    before = losses(config)
    checkpoint.discard(Path(config.logging.folder, "checkpoints", "step-00000024"))
    checkpoint.discard(Path(config.logging.folder, "checkpoints", "step-00000016"))
    assert launch(config, ["cuda:0"]) == 0
    after = losses(config)
    assert after[:8] == before[:8]
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.005)
