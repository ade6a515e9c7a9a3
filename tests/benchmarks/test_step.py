"""The benchmark of the whole step: it checks before it times, and counts what it says."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks.step import runs, speed
from benchmarks.step.providers import open_official, parse_provider
from benchmarks.workloads import Workload, parse_workload
from dmtjepa.models import AggregationHead
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.estimate import measure_masks, step_flops
from dmtjepa.training.optimizer import ShardedAdamW


def measured(workload: Workload, world, *providers: str, time_anyway: bool = False) -> list[dict]:
    parsed = [parse_provider(provider, "cpu") for provider in providers]
    return runs.measure_steps(workload, parsed, world, warmup=0, steps=3, seconds=60, time_anyway=time_anyway)


@pytest.mark.slow
def test_program_measures_every_provider(run_program, tiny):
    document, printed = run_program(
        speed, "step", "--workloads", "vit_nano:2", "--set", *tiny, "--steps", "3", "--threads", "1",
        "--providers", "reference", "project", "project:recompute",
    )  # fmt: skip
    names = ["reference float32", "project float32 eager", "project float32 eager recompute"]
    assert [row["provider"] for row in document["rows"]] == names
    assert {"hardware", "torch", "commit", "command"} <= set(document)
    for row in document["rows"]:
        assert row["correct"]
        assert row["steps"] == 3
        assert row["ms"] <= row["ms_p95"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["peak_bytes"] == row["held_bytes"] + row["transient_bytes"]
        assert row["speed_vs_reference"] == pytest.approx(document["rows"][0]["ms"] / row["ms"])
        assert set(row["phases_ms"]) >= {"targets", "predictions", "loss", "backward", "update", "teacher"}
        assert row["provider"] in printed
    assert "head" in document["rows"][1]["phases_ms"]


def _without_teacher_update(patch):
    patch.setattr(DMTJEPA, "update_teacher", lambda model, momentum: None)


def _without_update(patch):
    patch.setattr(ShardedAdamW, "step", lambda optimizer, *_: None)


def _with_features_of_another_image(patch):
    right = AggregationHead.aggregate_neighbors
    patch.setattr(AggregationHead, "aggregate_neighbors", lambda head, h, *rest: right(head, h.roll(1, 0), *rest))


def _with_a_scaled_gradient(patch):
    right = DMTJEPA.loss
    patch.setattr(DMTJEPA, "loss", lambda *arguments: (loss := right(*arguments)) + 0.01 * (loss - loss.detach()))


@pytest.mark.slow
def test_wrong_provider_is_timed_anyway_on_request(workload, world, monkeypatch):
    monkeypatch.setattr(runs, "LIMITS", dict.fromkeys(runs.LIMITS, (0.0, 0.0)))
    (row,) = measured(workload, world, "project", time_anyway=True)
    assert row["correct"] is False
    assert row["ms"] > 0
    assert runs.failed([row])
    assert "WRONG, timed anyway" in runs.problems([row])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_it",
    [_without_teacher_update, _without_update, _with_features_of_another_image, _with_a_scaled_gradient],
)
def test_wrong_provider_is_refused(workload, world, monkeypatch, break_it):
    runs.reference_values(workload, world.device)
    break_it(monkeypatch)
    (row,) = measured(workload, world, "project")
    assert row["correct"] is False
    assert "ms" not in row
    assert runs.failed([row])
    assert "WRONG" in runs.problems([row])[0]


def test_a_value_beside_a_zero_of_the_reference_is_wrong():
    assert runs._relative(1.0, 0.0) == runs._relative(0.0, 0.0) == math.inf


@pytest.mark.slow
def test_lack_of_memory_is_a_result(workload, world, monkeypatch):
    def build(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nmore")

    monkeypatch.setattr(runs, "build_step", build)
    (row,) = measured(workload, world, "project")
    assert row["error"] == "out of memory: CUDA out of memory. Tried to allocate 7 GiB."
    assert not runs.failed([row])


def test_median_percentile_and_mfu(workload, monkeypatch):
    monkeypatch.setattr(runs, "peak_rate", lambda device, dtype: (2e12, "data sheet"))
    provider = parse_provider("project:bfloat16", "cpu")
    seconds = [{"step": s, "head": s / 4} for s in (0.1, 0.2, 0.3, 0.4, 1.0)]
    row = runs.summarize(workload, provider, "cpu", [7] * 5, seconds)
    assert row["ms"] == pytest.approx(300)
    assert row["ms_p95"] == pytest.approx(880)  # 0.4 + 0.8 * (1.0 - 0.4): the point 0.95 * 4 of the sorted times
    assert row["images_per_s"] == pytest.approx(2 / 0.3)
    assert row["phases_ms"] == {"head": pytest.approx(75)}
    assert row["mfu"] == pytest.approx(workload.flops(7) / 0.3 / 2e12)


def test_flops_are_the_estimates_at_the_masks_of_the_step():
    workload = Workload("vit_base", 4)
    mean, _ = measure_masks(workload.config(), num_steps=1)
    assert workload.flops(0) == pytest.approx(4 * sum(step_flops(workload.config(), mean).values()))


def test_recorded_masks_are_those_of_the_seed_and_step(workload, tiny):
    again = parse_workload("vit_nano:2", tiny)
    assert torch.equal(workload.masks(3).context_index, again.masks(3).context_index)
    assert not torch.equal(workload.masks(3).target_index, workload.masks(4).target_index)


def test_provider_texts():
    assert parse_provider("project", "cuda").properties == ("bfloat16", "compiled")
    assert parse_provider("project:sdpa:float32", "cpu").name == "project float32 eager sdpa"
    for wrong in ("reference:compiled", "project:fast", "ours"):
        with pytest.raises(SystemExit, match=wrong.partition(":")[0]):
            parse_provider(wrong, "cpu")
    with pytest.raises(SystemExit, match="--official PATH"):
        open_official(None, ["official:float32"])


@pytest.mark.skipif("OFFICIAL" not in os.environ, reason="OFFICIAL names no checkout of the official code")
def test_official_step_agrees_with_the_reference(world, tiny):
    open_official(Path(os.environ["OFFICIAL"]), [])
    workload = Workload("vit_tiny", 2, (*tiny, "meta.pred_emb_dim=48"))
    (row,) = measured(workload, world, "official")
    assert row["correct"]
    assert row["checked_batch"] == 1
    assert set(row["phases_ms"]) == {"targets", "head", "predictions", "loss", "backward", "update", "teacher"}
