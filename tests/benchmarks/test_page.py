"""Pages of measured numbers are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu_check, machine, page, predictions
from benchmarks.step import attention, runs
from benchmarks.workloads import parse_workload

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_the_page_of_the_h200_is_made_from_its_files():
    documents = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("nvidia-h200-*.json")}
    assert (ROOT / "docs/h200.md").read_text() == page.make_page(documents), (
        "python -m benchmarks.page benchmarks/results/nvidia-h200-*.json > docs/h200.md"
    )


def test_bytes_of_bias_gradients_are_those_of_the_profile():
    profile = json.loads((RESULTS / "nvidia-h200-2026-11-26-profile.json").read_text())
    kernels = [
        f"triton_red_fused_{name}" for name in ("gelu_gelu_backward_sum_view_2", "stack_sum_view_9", "sum_view_7")
    ]
    measured = [row["gbytes"] for row in profile["rows"] if row["operator"] in kernels]
    assert len(measured) == 3
    steps = range(runs.CHECKED_STEPS, runs.CHECKED_STEPS + 3)
    counted = [predictions.bias_gradient_bytes(parse_workload("vit_huge:128"), step) / 1e9 for step in steps]
    assert sum(counted) / 3 == pytest.approx(sum(measured), rel=0.05)


def test_groups_have_the_flops_of_the_profile():
    profile = json.loads((RESULTS / "nvidia-h200-2026-11-26-profile.json").read_text())
    measured = page.profile_groups(profile["rows"])
    assert sum(group["ms"] for group in measured.values()) == pytest.approx(sum(row["ms"] for row in profile["rows"]))
    steps = range(runs.CHECKED_STEPS, runs.CHECKED_STEPS + 3)
    groups = predictions.kernel_groups(parse_workload("vit_huge:128"), steps)
    products = sum(group.flops for group in groups if re.match(page.PRODUCTS, group.name)) / 1e9
    attention = sum(group.flops for group in groups if group.name == "attention") / 1e9
    assert products == pytest.approx(measured["all products"]["gflop"], rel=0.01)
    assert attention == pytest.approx(measured["attention"]["gflop"], rel=0.01)


def test_a_page_that_is_made_again_counts_parameters_no_more(monkeypatch):
    """That takes seconds, and `gpu_check` makes its page after each step."""
    counted = []

    def count(config):
        counted.append(config)
        return {"encoder": 1, "teacher_encoder": 1}

    monkeypatch.setattr(predictions, "count_parameters", count)
    workload = parse_workload("vit_base:3")
    first, second = (predictions.kernel_groups(workload, range(2)) for _ in range(2))
    assert first == second
    assert len(counted) == 1


def document(**more) -> dict:
    row = {"workload": "ViT-huge/14 B=128", "provider": "project bfloat16 compiled", "correct": True}
    row |= {"ms": 200.04, "images_per_s": 640.0, "mfu": 0.49}
    return {
        "command": "python -m benchmarks.step.speed --out results", "hardware": "NVIDIA H100", "commit": "a" * 40,
        "uncommitted_changes": False, "date": "2026-11-26", "torch": "2", "triton": "3", "python": "3.12",
        "rows": [row], **more,
    }  # fmt: skip


def test_a_page_has_measurement_prediction_and_goal():
    text = page.make_page({"step.json": document()})
    assert "| ViT-huge/14 B=128 | project bfloat16 compiled | 640.0 | 200.0 | - | 49.0% |" in text
    assert "| 182 | 212 |" in text
    assert "| met | ViT-huge/14 B=128: MFU of at least 48% (49.0%) |" in text


def test_a_page_refuses_other_programs_and_several_gpus():
    with pytest.raises(ValueError, match=r"no table for other\.json"):
        page.make_page({"other.json": document(command="python -m benchmarks.data.masks")})
    with pytest.raises(ValueError, match="one GPU"):
        page.make_page({"a.json": document(), "b.json": document(hardware="NVIDIA H200")})


def test_a_check_has_tables_of_its_own_commit(tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others/step.json").write_text(json.dumps(document()))
    (tmp_path / "old.json").write_text(json.dumps(document(commit="b" * 40)))
    (tmp_path / "masks.json").write_text(json.dumps(document(command="python -m benchmarks.data.masks")))
    assert list(gpu_check.documents_of(tmp_path, "a" * 40)) == ["others/step.json"]


def test_a_copied_tree_names_its_commit(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "c" * 40)
    found = machine.environment("cpu")
    assert (found["commit"], found["uncommitted_changes"]) == ("c" * 40, None)


def test_a_command_does_not_name_folders_of_the_machine():
    assert machine.portable_command(["/opt/bin/python3", "-m", "x", "--out", "/home/me/results", "b/c"]) == (
        "python3 -m x --out results b/c"
    )


@pytest.mark.parametrize(("milliseconds", "expected"), [(0.97, {64: "sdpa"}), (0.99, {})])
def test_an_attention_kernel_must_be_faster_by_more_than_noise(milliseconds, expected):
    rows = [
        {"head_size": 64, "kernel": kernel, "correct": True, "ms": ms}
        for kernel, ms in (("xformers", 1.0), ("sdpa", milliseconds))
    ]
    assert attention.choices(rows) == expected
