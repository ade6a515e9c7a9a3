"""The loop on one GPU, and on two: bfloat16, compiled blocks, Triton kernels, NCCL."""

import math
from pathlib import Path

import pytest
import torch

from dmtjepa import checkpoint_format
from dmtjepa.run_folder import RunFolder
from dmtjepa.training import instruments
from dmtjepa.training.graphs import GraphedStep
from dmtjepa.training.launch import launch
from dmtjepa.training.metrics import Metrics
from dmtjepa.training.saving import Saver
from dmtjepa.training.step import TrainStep

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[(1, 1), (2, 2), (2, 1)], ids=["alone", "two-sharded", "two-copies"])
def devices_and_changes(request):
    """The devices of a run, and the settings that divide its global batch of 16 among them."""
    count, shard_size = request.param
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    devices = [f"cuda:{index}" for index in range(count)]
    return devices, {"data.batch_size": 16 // count, "runtime.shard_size": shard_size}


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_trains_as_on_the_cpu_up_to_bfloat16(plain, settings, losses, compiled, devices_and_changes):
    devices, changes = devices_and_changes
    config = settings(**changes | {"runtime.compile": compiled})
    assert launch(config, devices) == 0
    torch.testing.assert_close(losses(config), losses(plain), rtol=0.05, atol=0.01)


@pytest.fixture
def _no_waiting(monkeypatch):
    """From the third step on (the first ones create what later ones use), nothing may wait for the device, in whichever
    thread, but the logging of steps and the copying of a state that will be written."""
    original = TrainStep.__call__

    def checked_step(train_step, micro_batches, step):
        if step >= 2:
            torch.cuda.set_sync_debug_mode("error")
        return original(train_step, micro_batches, step)

    def allowed(function):
        def run(*arguments):
            torch.cuda.set_sync_debug_mode("default")
            return function(*arguments)

        return run

    monkeypatch.setattr(TrainStep, "__call__", checked_step)
    monkeypatch.setattr(instruments, "LOOK_EVERY", 3)  # at each logged step
    monkeypatch.setattr(Saver, "save", allowed(Saver.save))
    monkeypatch.setattr(Metrics, "flush", allowed(Metrics.flush))
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask.pack": True},
        {"mask.pack": True, "runtime.attention": "sdpa"},
        {"patch.local_agg_head": False},
        {"optimization.context_loss": 0.5},
        {"optimization.context_loss": 0.5, "mask.pack": True},
        {"runtime.teacher_precision": "fp8"},
        {"runtime.kernels": "torch"},
        {"runtime.fused_update": True, "optimization.clip_grad": 1.0},
        {"runtime.attention": "sdpa", "runtime.activation_checkpointing": "pointwise"},
        {"runtime.precision": "float32", "runtime.activation_checkpointing": "blocks"},
        {"runtime.accumulation": 2, "runtime.save_every_steps": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("_no_waiting")
def test_no_step_between_two_logged_ones_waits_for_the_device(settings, losses, changes):
    if changes.get("runtime.teacher_precision") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    briefly = {"runtime.compile": "off", "optimization.epochs": 2, "runtime.save_every_epochs": 2}
    config = settings(**briefly | changes)
    assert launch(config, ["cuda:0"]) == 0
    assert all(map(math.isfinite, losses(config)))


def test_graphs_give_the_losses_of_the_same_steps_without_graphs_bit_for_bit(settings, losses, monkeypatch):
    replayed = []

    def replay(step, *arguments):
        replayed.append(step)
        return original(step, *arguments)

    original = GraphedStep._replay
    monkeypatch.setattr(GraphedStep, "_replay", replay)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it, flash kernels add in any order
    changes = {"runtime.attention": "sdpa", "runtime.fused_update": True, "runtime.cuda_graphs": "on"}
    changes |= {"runtime.compile": "off", "mask.context_cut": "rank", "optimization.clip_grad": 1.0}
    try:
        config = settings("graphs", **changes)
        assert launch(config, ["cuda:0"]) == 0
        assert len(replayed) >= 3
        with_graphs = losses(config)
        checkpoint_format.discard(Path(config.logging.folder, "checkpoints", "step-00000024"))
        assert launch(config, ["cuda:0"]) == 0  # goes on after step 16
        assert losses(config) == with_graphs
        monkeypatch.setattr(GraphedStep, "_may_capture", lambda *arguments: False)
        del replayed[:]
        config = settings("eager", **changes)
        assert launch(config, ["cuda:0"]) == 0
        assert not replayed
        assert losses(config) == with_graphs
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_replayed_step_that_is_not_finite_leaves_the_student_as_it_is(settings, losses, monkeypatch):
    kept = []

    def replay(step, *arguments):
        position = step.train_step.model.predictor.predictor_pos_embed  # a graph reads it
        finite = position.clone()
        weights = [parameter.detach().clone() for parameter in step.train_step.parameters]
        if len(kept) == 1:
            position.fill_(math.nan)
        results = original(step, *arguments)
        position.copy_(finite)
        kept.append(all(map(torch.equal, weights, step.train_step.parameters)))
        assert results.isfinite().all() == (len(kept) != 2)
        return results

    original = GraphedStep._replay
    monkeypatch.setattr(GraphedStep, "_replay", replay)
    changes = {"runtime.fused_update": True, "runtime.cuda_graphs": "on", "runtime.compile": "off"}
    changes |= {"mask.context_cut": "rank", "runtime.attention": "sdpa", "optimization.max_skipped_steps": 1}
    config = settings(**changes)
    assert launch(config, ["cuda:0"]) == 0
    assert len(kept) >= 3
    assert kept == [number == 1 for number in range(len(kept))]
    assert sum(map(math.isnan, losses(config))) == 1


def test_resumes_from_a_checkpoint_of_the_gpu(settings, losses, devices_and_changes):
    devices, changes = devices_and_changes
    config = settings(**changes | {"runtime.keep_last": 5})
    assert launch(config, devices) == 0
    before = losses(config)
    checkpoint_format.discard(Path(config.logging.folder, "checkpoints", "step-00000024"))
    checkpoint_format.discard(Path(config.logging.folder, "checkpoints", "step-00000016"))
    assert launch(config, devices) == 0
    after = losses(config)
    assert after[:8] == before[:8]
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.005)


def test_evaluates_during_training(settings, labelled, devices_and_changes):
    devices, changes = devices_and_changes
    changes |= {"runtime.compile": "off", "evaluation.every_epochs": 1, "evaluation.data": str(labelled)}
    config = settings(**changes | {"optimization.epochs": 2})
    assert launch(config, devices) == 0
    rows = [row for row in RunFolder.from_config(config).read_metrics() if "eval/seconds" in row]
    assert [row["step"] for row in rows] == [7, 15]
    assert all(math.isfinite(row["eval/linear"]) for row in rows)
