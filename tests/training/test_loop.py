"""The loop: the same training on any number of processes, after any interruption."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from dmtjepa.training.launch import launch

NUM_STEPS = 24


def assert_same_run(first, second, losses, weights, tolerance):
    torch.testing.assert_close(losses(first), losses(second), rtol=0, atol=tolerance)
    old, new = weights(first), weights(second)
    assert old.keys() == new.keys()
    largest = max(float((old[name] - new[name]).abs().max()) for name in old)
    assert largest <= 100 * tolerance


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


def test_export_has_the_published_layout(plain):
    latest = torch.load(Path(plain.logging.folder, "jepa-latest.pth.tar"), weights_only=True)
    published = {
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
    assert latest.keys() == published | {"head", "target_head", "step"}
    assert latest["epoch"] == 3
    assert latest["step"] == NUM_STEPS
    assert latest["encoder"]["module.blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert latest["encoder"]["module.pos_embed"].shape == (1, 64, 32)
    assert latest["target_head"]["module.cls_blocks.1.attn.q.weight"].shape == (32, 32)
    last = torch.load(Path(plain.logging.folder, "jepa-ep3.pth.tar"), weights_only=True)
    assert last["epoch"] == 3
    # The published optimizer has six groups, whose parameters include both position embeddings, without state.
    groups = latest["opt"]["param_groups"]
    assert [group["WD_exclude"] for group in groups] == [False, False, True, True, False, True]
    indices = [index for group in groups for index in group["params"]]
    assert indices == list(range(len(indices)))
    without = set(indices) - latest["opt"]["state"].keys()
    first_of_predictor = groups[1]["params"][0]
    assert without == {0, first_of_predictor + 1}
    assert latest["opt"]["state"][first_of_predictor]["exp_avg"].shape == (1, 1, 16)  # the mask token
    assert float(latest["opt"]["state"][1]["step"]) == NUM_STEPS


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"data.batch_size": 8}),
        (4, {"data.batch_size": 4}),
        (1, {"data.batch_size": 8, "runtime.accumulation": 2}),
        (2, {"data.batch_size": 4, "runtime.accumulation": 2, "runtime.reshard_after_forward": False}),
        (4, {"data.batch_size": 4, "runtime.shard_size": 2}),
        (1, {"runtime.activation_checkpointing": True}),
    ],
    ids=["2", "4", "accumulation", "2-accumulation", "hsdp", "activation-checkpointing"],
)
def test_same_training_however_the_global_batch_is_divided(plain, settings, losses, weights, processes, changes):
    divided = settings("divided", **changes)
    assert launch(divided, ["cpu"] * processes) == 0
    assert_same_run(plain, divided, losses, weights, tolerance=1e-5)
