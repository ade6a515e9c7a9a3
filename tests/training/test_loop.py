"""The loop: the same training on any number of processes, after any interruption."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import yaml

from dmtjepa import checkpoint_format
from dmtjepa.run_folder import RunFolder, RunFolderError
from dmtjepa.training import launch as launcher
from dmtjepa.training import parallelize
from dmtjepa.training.finite import NonFiniteLoss
from dmtjepa.training.launch import launch
from dmtjepa.training.metrics import Metrics
from dmtjepa.training.state import TrainingState
from dmtjepa.training.step import TrainStep

ROOT = Path(__file__).parents[2]
NUM_STEPS = 24


def assert_same_run(first, second, losses, weights, tolerance):
    torch.testing.assert_close(losses(first), losses(second), rtol=0, atol=tolerance)
    old, new = weights(first), weights(second)
    assert old.keys() == new.keys()
    largest = max(float((old[name] - new[name]).abs().max()) for name in old)
    assert largest <= 100 * tolerance


@pytest.mark.slow
def test_training_learns_and_writes_what_it_promises(plain, losses):
    values = losses(plain)
    assert len(values) == NUM_STEPS
    assert sum(values[-4:]) < 0.7 * sum(values[:4])
    folder = Path(plain.logging.folder)
    header = (folder / "jepa_r0.csv").read_text().splitlines()[0]
    assert header == "epoch,itr,loss,mask-A,mask-B,time (ms)"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == plain.model_dump(mode="json")
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert torch.__version__.startswith(start["packages"]["torch"])
    assert start["global_batch"] == 16
    assert list((folder / "tensorboard").iterdir())
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000016", "step-00000024"]  # keep_last is 2


def test_export_has_the_official_layout(plain):
    latest = torch.load(Path(plain.logging.folder, "jepa-latest.pth.tar"), weights_only=True)
    official = {
        "encoder",
        "predictor",
        "target_encoder",
        "opt",
        "scaler",
        "epoch",
        "loss",
        "batch_size",
        "world_size",
        "lr",
    }
    assert latest.keys() == official | {"head", "target_head", "step"}
    assert latest["epoch"] == 3
    assert latest["step"] == NUM_STEPS
    assert latest["encoder"]["module.blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert latest["encoder"]["module.pos_embed"].shape == (1, 64, 32)
    assert latest["target_head"]["module.cls_blocks.1.attn.q.weight"].shape == (32, 32)
    last = torch.load(Path(plain.logging.folder, "jepa-ep3.pth.tar"), weights_only=True)
    assert last["epoch"] == 3
    # The official optimizer has six groups, whose parameters include both position embeddings, without state.
    groups = latest["opt"]["param_groups"]
    assert [group["WD_exclude"] for group in groups] == [False, False, True, True, False, True]
    indices = [index for group in groups for index in group["params"]]
    assert indices == list(range(len(indices)))
    without = set(indices) - latest["opt"]["state"].keys()
    first_of_predictor = groups[1]["params"][0]
    assert without == {0, first_of_predictor + 1}
    assert latest["opt"]["state"][first_of_predictor]["exp_avg"].shape == (1, 1, 16)  # the mask token
    assert float(latest["opt"]["state"][1]["step"]) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"data.batch_size": 8}),
        (1, {"data.batch_size": 8, "runtime.accumulation": 2}),
        (2, {"data.batch_size": 4, "runtime.accumulation": 2, "runtime.reshard_after_forward": False}),
        (4, {"data.batch_size": 2, "runtime.accumulation": 2, "runtime.shard_size": 2}),
        (1, {"runtime.activation_checkpointing": "blocks"}),
        (1, {"runtime.activation_checkpointing": "pointwise"}),
    ],
    ids=["2", "accumulation", "2-accumulation", "hsdp-accumulation", "blocks", "pointwise"],
)
def test_same_training_however_the_global_batch_is_divided(plain, settings, losses, weights, processes, changes):
    divided = settings("divided", **changes)
    assert launch(divided, ["cpu"] * processes) == 0
    assert_same_run(plain, divided, losses, weights, tolerance=1e-5)


@pytest.mark.slow
def test_torchrun_gives_the_run_of_main(plain, settings, losses, tmp_path):
    config = settings(**{"data.batch_size": 8})
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/helpers/tiny_main.py"), "--fname", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(config), losses(plain), rtol=0, atol=1e-5)


def stop_after(config, steps, devices, monkeypatch):
    """Run until a checkpoint of `steps` steps is on disk, as a run that ends there."""
    folder = Path(config.logging.folder)
    record = Metrics.record

    def record_and_stop(metrics, batch, *values):
        record(metrics, batch, *values)
        if batch.step + 2 == steps:  # the ranks stop one step after a vote
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "record", record_and_stop)
        patch.setattr(launcher, "hand_over", lambda outcome: None)
        assert launch(config, devices) == 0
    assert checkpoint_format.newest_whole(folder / "checkpoints").name == f"step-{steps:08d}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [pytest.param(2, marks=pytest.mark.slow), 8, pytest.param(13, marks=pytest.mark.slow)]
)
def test_resumed_run_equals_the_uninterrupted_one_bit_by_bit(plain, settings, losses, weights, monkeypatch, steps):
    config = settings()
    stop_after(config, steps, ["cpu"], monkeypatch)
    assert len(losses(config)) == steps
    assert launch(config, ["cpu"]) == 0
    assert_same_run(plain, config, losses, weights, tolerance=0)


@pytest.mark.slow
def test_resumes_on_other_numbers_of_processes(plain, settings, losses, weights):
    """4, then 2, then 1 processes, at the same global batch; what came after steps 8 and 16 is thrown away."""
    for processes, discarded in ((4, (16, 24)), (2, (24,)), (1, ())):
        config = settings(**{"data.batch_size": 16 // processes, "runtime.keep_last": 5})
        assert launch(config, ["cpu"] * processes) == 0
        assert_same_run(plain, config, losses, weights, tolerance=1e-5)
        for step in discarded:
            checkpoint_format.discard(Path(config.logging.folder, "checkpoints", f"step-{step:08d}"))
    starts = json.loads(Path(config.logging.folder, "environment.json").read_text())["starts"]
    assert [(row["processes"], row["step"]) for row in starts] == [(4, 0), (2, 8), (1, 16)]


class Poison:
    """Makes the loss of one step infinite or not a number, on one rank."""

    def __init__(self, monkeypatch, step, value):
        original = TrainStep.__call__

        def poisoned_step(train_step, micro_batches, current):
            if current != step or dist.get_rank() != 0:
                return original(train_step, micro_batches, current)
            loss = train_step.model.loss
            train_step.model.loss = lambda *arguments: loss(*arguments) * value
            try:
                return original(train_step, micro_batches, current)
            finally:
                del train_step.model.loss

        monkeypatch.setattr(TrainStep, "__call__", poisoned_step)


@pytest.mark.slow
def test_not_finite_loss_stops_with_step_samples_and_state(settings, monkeypatch):
    config = settings()
    Poison(monkeypatch, 13, float("inf"))
    with pytest.raises(NonFiniteLoss, match=r"step 13 \(epoch 1, samples 80 to 95 of its order\).*max_skipped_steps"):
        launch(config, ["cpu"])
    folder = Path(config.logging.folder)
    (row,) = json.loads((folder / "not_finite" / "steps.json").read_text())
    assert row["step"] == 13
    assert row["samples"] == [80, 95]
    saved = checkpoint_format.newest_whole(folder / "not_finite")
    assert all(tensor.isfinite().all() for tensor in checkpoint_format.load_full(saved).values())
    assert checkpoint_format.newest_whole(folder / "checkpoints").name == "step-00000008"


@pytest.mark.slow
def test_not_finite_loss_can_be_skipped(plain, settings, losses, monkeypatch):
    config = settings(**{"optimization.max_skipped_steps": 1})
    Poison(monkeypatch, 13, float("nan"))
    assert launch(config, ["cpu"]) == 0
    values = losses(config)
    assert values[:13] == losses(plain)[:13]
    assert math.isnan(values[13])
    assert all(map(math.isfinite, values[14:]))
    meta = checkpoint_format.read_meta(checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints")))
    assert meta["num_skipped"] == 1
    assert meta["optimizer_steps"] == NUM_STEPS - 1


@pytest.mark.slow
def test_gradient_clipping_changes_training_as_it_should(plain, settings, losses):
    clipped = settings("clipped", **{"optimization.clip_grad": 0.05})
    loose = settings("loose", **{"optimization.clip_grad": 1e9})
    for config in (clipped, loose):
        assert launch(config, ["cpu"]) == 0
    assert losses(loose) == losses(plain)
    assert losses(clipped)[0] == losses(plain)[0]
    assert losses(clipped)[2:] != losses(plain)[2:]


@pytest.mark.slow
def test_plain_ijepa_trains(settings, losses):
    config = settings(**{"patch.local_agg_head": False, "optimization.epochs": 2})
    assert launch(config, ["cpu"]) == 0
    assert len(losses(config)) == 16
    latest = torch.load(Path(config.logging.folder, "jepa-latest.pth.tar"), weights_only=True)
    assert "head" not in latest


def test_folder_of_another_run_is_refused_untouched(plain, settings_in):
    folder = Path(plain.logging.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    other = settings_in(folder, **{"optimization.lr": 5e-3, "data.batch_size": 8, "runtime.seed": 3})
    with pytest.raises(RunFolderError) as error:
        launch(other, ["cpu"])
    for text in ("optimization.lr: 0.002 there, 0.005 now", "runtime.seed: 0 there, 3 now", "16 there, 8 now"):
        assert text in str(error.value)
    assert "batch_size: " not in str(error.value).replace("data.batch_size x", "")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_folder_of_another_program_is_refused(settings, tmp_path):
    config = settings()
    Path(config.logging.folder).mkdir()
    Path(config.logging.folder, "jepa-latest.pth.tar").write_text("precious")
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        launch(config, ["cpu"])
    assert Path(config.logging.folder, "jepa-latest.pth.tar").read_text() == "precious"


def test_folder_in_use_is_refused(settings):
    config = settings()
    with RunFolder.from_config(config).locked(), pytest.raises(RunFolderError, match=r"being written by another run"):
        launch(config, ["cpu"])


@pytest.mark.slow
def test_a_run_goes_on_on_devices_of_another_kind(settings, losses, monkeypatch):
    """From CPUs to GPUs and back: the state of a GPU has a generator that the state of a CPU has not."""
    config = settings(**{"optimization.epochs": 2})
    assert launch(config, ["cpu"]) == 0
    on_cpus, last = losses(config), Path(config.logging.folder, "checkpoints", "step-00000016")
    checkpoint_format.discard(last)
    original = TrainingState.tensors
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "tensors", lambda state: original(state) | {"rng.cuda.0": torch.zeros(16)})
        assert launch(config, ["cpu"]) == 0
    assert losses(config) == on_cpus
    assert "rng.cuda.0" in checkpoint_format.tensor_names(last)
    assert launch(config, ["cpu"]) == 0


def test_finished_run_started_again_does_nothing(plain, losses, weights):
    before = losses(plain), weights(plain)
    assert launch(plain, ["cpu"]) == 0
    assert losses(plain) == before[0]
    torch.testing.assert_close(weights(plain), before[1], rtol=0, atol=0)


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint_and_says_so(settings, start):
    """A limit on the size of a file stands in for a disk that fills up."""
    config = settings(**{"optimization.epochs": 2})
    checkpoints = Path(config.logging.folder, "checkpoints")
    assert launch(config, ["cpu"]) == 0
    checkpoint_format.discard(checkpoints / "step-00000016")
    before = checkpoint_format.newest_whole(checkpoints)
    assert before.name == "step-00000008"

    process = start(config, "cpu", largest_file=60_000)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "could not be written" in output
    assert "File too large" in output
    assert checkpoint_format.newest_whole(checkpoints) == before
    assert not list(checkpoints.glob(".writing-*"))


@pytest.mark.slow
def test_compiled_equals_eager(plain, settings, losses, weights, monkeypatch):
    """With the graphs, decompositions and partition of Inductor, whose C++ would take minutes to compile."""
    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(parallelize, "compile_blocks", functools.partial(parallelize.compile_blocks, compiler=compiler))
    config = settings(**{"runtime.compile": "on"})
    assert launch(config, ["cpu"]) == 0
    assert_same_run(plain, config, losses, weights, tolerance=1e-5)
