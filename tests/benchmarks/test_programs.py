"""The other programs run from end to end on a tiny model, and their arithmetic is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_memory, bench_operators, bench_scaling, gpu_check, harness, profile_step
from benchmarks.harness import Shape

ROOT = Path(__file__).parents[2]


def test_memory_beside_its_estimate(run_program, tiny):
    document, printed = run_program(
        bench_memory, "memory", "--models", "vit_nano", "--batches", "2", "4", "--set", *tiny,
        "--providers", "project", "reference",
    )  # fmt: skip
    rows = document["rows"]
    assert [(row["provider"].split()[0], row["batch"]) for row in rows] == [
        ("project", 2), ("reference", 2), ("project", 4), ("reference", 4),
    ]  # fmt: skip
    for row in rows:
        assert row["peak_bytes"] == row["held_bytes"] + row["transient_bytes"]
    small, large = rows[0], rows[2]
    assert small["held_bytes"] == large["held_bytes"]
    assert small["transient_bytes"] < large["transient_bytes"]
    assert small["estimate_error"] == pytest.approx(small["estimate_bytes"] / small["peak_bytes"] - 1)
    assert "estimate" in printed


def test_peak_memory_counts_what_a_call_holds():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        return second, third

    assert harness.peak_memory(call, "cpu") == 3000


def test_operators_in_one_table(run_program, monkeypatch):
    tiny = Shape("base", dim=32, num_heads=2, patch_size=16, batch_size=2)
    monkeypatch.setitem(harness.SHAPES, "base", tiny)
    monkeypatch.setattr(harness, "milliseconds", lambda function, device: 2.0)
    harness.copy_bandwidth.cache_clear()

    class Program:
        __name__ = "bench_operators"

        @staticmethod
        def main():
            harness.main("", "operators", *(benchmark.cases for benchmark in bench_operators.BENCHMARKS))

    document, printed = run_program(Program, "operators", "--shapes", "base", "--batch", "2")
    harness.copy_bandwidth.cache_clear()
    operators = {row["operator"].split()[0] for row in document["rows"]}
    assert operators == {
        "gather_tokens", "embed_patches", "select_neighbors", "aggregate_neighbors", "pool_neighbors",
        "indexed_smooth_l1",
    }  # fmt: skip
    for row in document["rows"]:
        assert row["correct"]
        assert row["gb_per_s"] == pytest.approx(row["unique_bytes"] / 2e6)
        assert row["operator"] in printed


def test_profile_names_operators(run_program, tmp_path, tiny):
    document, printed = run_program(
        profile_step, "profile", "--model", "vit_nano:2", "--set", *tiny, "--steps", "1", "--threads", "1"
    )
    rows = {row["operator"]: row for row in document["rows"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["aten::mm"]["gflop"] > 0
    assert rows["aten::mm"]["roofline"] > 0
    assert "aten::mm" in printed
    assert list(tmp_path.glob("*-trace.json.gz"))


def test_flops_and_bytes_of_a_product():
    shapes, types = [[8], [3, 4], [4, 8], [], []], ["float", "float", "float", "", ""]
    assert profile_step.flops("aten::addmm", shapes) == 2 * 3 * 4 * 8
    assert profile_step.num_bytes("aten::addmm", shapes, types) == 4 * (8 + 3 * 4 + 4 * 8 + 3 * 8)
    assert profile_step.flops("aten::copy_", [[5], [5], []]) is None
    assert profile_step.num_bytes("aten::copy_", [[5], [5], []], ["float", "c10::BFloat16", ""]) == 20 + 10 + 20


def test_two_processes(tmp_path, tiny):
    command = [sys.executable, "-m", "benchmarks.bench_scaling", "--processes", "2", "--model", "vit_nano:2"]
    done = subprocess.run(
        [*command, "--scaling", "strong", "--set", *tiny, "--steps", "2", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = bench_scaling.collect(tmp_path)
    assert (row["processes"], row["batch"], row["global_batch"]) == (2, 2, 4)
    assert row["images_per_s"] == pytest.approx(4e3 / row["ms"])
    assert 0 < row["waiting"] < 1
    assert "efficiency" in done.stdout


def test_efficiency_against_the_smallest_world(tmp_path):
    for processes, images_per_s in ((8, 5600.0), (1, 1000.0)):
        row = {"model": "vit_huge", "provider": "project", "scaling": "weak", "batch": 128}
        row |= {"processes": processes, "images_per_s": images_per_s}
        document = {"hardware": "NVIDIA H100 80GB HBM3", "rows": [row]}
        (tmp_path / f"h100-scaling-{processes}.json").write_text(json.dumps(document))
    one, eight = bench_scaling.collect(tmp_path)
    assert (one["efficiency"], eight["efficiency"]) == (1, pytest.approx(0.7))
    assert one["predicted"] > eight["predicted"] > 0.7  # the model's: 8 GPUs of one node lose little


def test_union_of_spans():
    assert bench_scaling.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4


def test_goals_of_the_step(tmp_path):
    shared = {"model": "ViT-huge/14 B=128", "batch": 128, "speed_vs_reference": 9.0, "memory_vs_reference": 0.1}
    rows = [
        shared | {"provider": "published bfloat16", "mfu": 0.2, "images_per_s": 300.0},
        shared | {"provider": "project bfloat16 compiled", "mfu": 0.5, "images_per_s": 630.0}
        | {"speed_vs_published": 2.1, "memory_vs_published": 0.6},
        shared | {"provider": "project bfloat16 compiled fp8", "mfu": 0.53, "images_per_s": 670.0},
    ]  # fmt: skip
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "h200-step.json").write_text(json.dumps({"rows": rows}))
    assert gpu_check.goals(tmp_path) == {
        "ViT-huge/14 B=128: float8 teacher at least 10% faster (+6%)": False,
        "ViT-huge/14 B=128: at least 2.0x the published step (2.10x)": True,
        "ViT-huge/14 B=128: at most 0.5x the memory of the published step (0.60x)": False,
        "ViT-huge/14 B=128: MFU of at least 48% (50.0%)": True,
    }
