"""One kernel for AdamW, the teacher's average and the weights' copies, in training."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import triton

from dmtjepa import checkpoint_format
from dmtjepa.config import MaskSettings, OptimizationSettings
from dmtjepa.kernels.update_weights import launch_update_weights
from dmtjepa.masks import MaskSampler
from dmtjepa.models import AggregationHead, Predictor, VisionTransformer
from dmtjepa.objective import DMTJEPA
from dmtjepa.training import fused_update
from dmtjepa.training import optimizer as optimizer_module
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.launch import launch
from dmtjepa.training.parallelize import CASTING_VERSIONS, build_mesh, parallelize, weight_copies
from dmtjepa.training.state import model_state, optimizer_steps
from dmtjepa.training.step import TrainStep
from tests.helpers.models import SCHEDULES


@pytest.mark.slow
def test_a_run_goes_on_with_it_from_a_checkpoint_that_was_written_without_it(plain, settings, losses, weights):
    config = settings(**{"runtime.fused_update": True})
    shutil.copytree(plain.logging.folder, config.logging.folder)
    checkpoint_format.discard(Path(config.logging.folder, "checkpoints", "step-00000024"))
    assert launch(config, ["cpu"]) == 0
    torch.testing.assert_close(losses(config), losses(plain), rtol=1e-5, atol=0)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(config)[name], tensor, rtol=1e-4, atol=1e-6)


def train(fused, dtype, clip_grad, frozen):
    """Losses of 3 steps, the second of which is not finite, and all that a checkpoint would hold."""
    torch.manual_seed(0)
    encoder = VisionTransformer(32, 8, embed_dim=32, depth=1, num_heads=2)
    encoder.patch_embed.proj.weight.requires_grad_(not frozen)
    predictor = Predictor((4, 4), embed_dim=32, predictor_dim=16, depth=1, num_heads=2)
    model, mesh = DMTJEPA(encoder, predictor, AggregationHead(32, 2)), build_mesh("cpu", 1)
    with torch.no_grad():
        for parameter in model.teacher_encoder.parameters():
            parameter.mul_(1.1)  # so that weights that are not trained are seen to be averaged
    parallelize(model, mesh, ComputePlan(dtype, keep_copies=fused))
    settings = OptimizationSettings(clip_grad=clip_grad)
    step = TrainStep(model, settings, SCHEDULES, mesh, torch.device("cpu"), fused=fused)
    found = []
    for number in range(3):
        images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        masks = MaskSampler(MaskSettings(patch_size=8, min_keep=0), (4, 4), 2).sample(number)
        factor = torch.nan if number == 1 else 1.0
        handle = encoder.register_forward_hook(lambda *arguments, factor=factor: arguments[-1] * factor)
        found.append(step([(images, masks)], number)[0])
        handle.remove()
        assert all(parameter.grad is None for parameter in model.parameters())
    copies = weight_copies(model)
    assert len(copies) == (len(list(model.parameters())) if fused else 0)
    for parameter, copied in copies.items():
        torch.testing.assert_close(copied, parameter.to_local().to(dtype), rtol=0, atol=0)
    assert optimizer_steps(step.optimizer) == 2
    for copied in copies.values():  # they are not made again from the weights
        copied.zero_()
    with torch.no_grad():
        model.compute_targets(images, masks)
    assert not any(copied.any() for copied in copies.values())
    return torch.stack(found), {
        name: t.full_tensor() for name, t in model_state(model, step.optimizer).items() if hasattr(t, "full_tensor")
    }


@pytest.mark.usefixtures("_alone")
@pytest.mark.skipif(not torch.__version__.startswith(CASTING_VERSIONS), reason="no copies with another PyTorch")
@pytest.mark.parametrize(
    ("kernel", "clip_grad"), [(False, None), (False, 0.01), pytest.param(True, 0.01, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_separate_updates(monkeypatch, kernel, clip_grad):
    if kernel and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off, because there is a GPU or TRITON_INTERPRET=0")
    dtype = torch.float32 if kernel else torch.bfloat16  # the interpreter's bfloat16 is not rounded to nearest
    frozen = clip_grad is not None
    expected, expected_state = train(False, dtype, clip_grad, frozen)
    if kernel:
        monkeypatch.setattr(fused_update, "update_weights", launch_update_weights)
        module = sys.modules[launch_update_weights.__module__]
        monkeypatch.setattr(module, "_BLOCK", module._CHUNK)  # fewer of them take less time
    else:
        monkeypatch.setattr(optimizer_module, "UPDATED_BYTES", 20_000)  # several parts
    losses, state = train(True, dtype, clip_grad, frozen)
    assert expected.isfinite().tolist() == [True, False, True]
    limits = {"rtol": 1e-4, "atol": 1e-6} if kernel else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses, expected, equal_nan=True, **limits)
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[name], msg=lambda text, n=name: f"{n}: {text}", **limits)
