"""Numbers of the H200 in docs/performance.md are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks import page

ROOT = Path(__file__).parents[2]
SECTIONS = ("The whole step on a GPU", "Operators on a GPU", "Tests on a GPU")
# Goals, rates of the hardware, predictions, and a sum of two measured columns: not measurements of a file.
NOT_MEASURED = (
    "70% of the bandwidth", "(48% and 38%)", "(0.5x)", "(10% faster", "(2.0x and 2.3x)", "at 90%", "about 7 ms",
    "predicted 24", "a GPU with 139 GiB",
)  # fmt: skip


def read(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/nvidia-h200-2026-11-26-{name}.json").read_text())


def step_phrases() -> list[str]:
    rows = {(row["model"], row["provider"]): row for name in ("step-huge", "step-others") for row in read(name)["rows"]}
    found = []
    for (_, provider), row in rows.items():
        start = f"| {row['ms']:.0f} | {row['mfu']:.1%} | {row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
        if provider.startswith("reference") or row["model"] == "vit_large":
            continue
        found.append(f"{start} | {row['speed_vs_official']:.2f}x | {row['memory_vs_official']:.2f}x |")
    official = rows["vit_large", "official bfloat16"]["ms"]
    plain, fp8 = (rows["vit_huge", f"project bfloat16 compiled{more}"] for more in ("", " fp8"))
    teachers = [row["phases_ms"]["targets"] for row in (fp8, plain)]
    return [
        *found,
        f"MFU refers to {plain['peak_tflop_per_s']:.0f} TFLOP/s",
        f"(official: {official:.0f} ms)",
        f"it is {plain['ms'] / fp8['ms'] - 1:.0%})",
        f"Measured on an H200: {plain['ms'] - fp8['ms']:.0f} ms",
        f"the teacher of ViT-H/14 takes {teachers[0]:.0f} ms instead of {teachers[1]:.0f}",
    ]


def profile_phrases() -> list[str]:
    profile = read("profile")
    rows, groups = {row["operator"]: row for row in profile["rows"]}, page.profile_groups(profile["rows"])
    total = sum(row["ms"] for row in rows.values())
    products = [rows[f"aten::{name}"] for name in ("addmm", "mm", "bmm")]
    bound = sum(row["ms"] * row["roofline"] for row in products) / groups["all products"]["ms"]
    flash = [rows[f"aten::_flash_attention_{name}"] for name in ("forward", "backward")]
    norms = [rows[f"triton_red_fused_{name}"] for name in ("native_layer_norm_0", "add_native_layer_norm_view_1")]
    gelu = rows["triton_poi_fused_gelu_view_2"]
    saved = sum(row["ms"] * (1 - row["roofline"] / 0.9) for row in (*norms, gelu))
    inductor = sum(row["ms"] for name, row in rows.items() if name.startswith("triton_"))
    step = next(row["ms"] for row in read("step-huge")["rows"] if row["provider"] == "project bfloat16 compiled")
    copies = sum(rows[f"aten::{name}"]["ms"] for name in ("_foreach_copy_", "_chunk_cat"))
    sums = [rows[f"triton_red_fused_{n}"] for n in ("gelu_gelu_backward_sum_view_2", "stack_sum_view_9", "sum_view_7")]
    summed = sum(row["ms"] for row in sums)
    return [
        f"(profile of three steps, {total:.0f} ms of operators)",
        f"Matrix products take {groups['all products']['ms']:.0f} ms and run at {bound:.0%} of the rate",
        f"({profile['product_tflop_per_s']:.0f} TFLOP/s)",
        f"Attention takes {sum(row['ms'] for row in flash):.0f} ms, forward at {flash[0]['roofline']:.0%} and backward "
        f"at {flash[1]['roofline']:.0%} of that rate",
        f"Kernels of Inductor take {inductor:.0f} ms",
        f"reach {norms[0]['roofline']:.0%} to {norms[1]['roofline']:.0%} of the bandwidth, GELU {gelu['roofline']:.0%}",
        f"would take {saved:.0f} ms less",
        f"AdamW takes {rows['aten::_fused_adamw_']['ms']:.1f} ms, FSDP2's copies on one GPU {copies:.1f} ms, the "
        f"teacher's average {rows['aten::_foreach_lerp_']['ms']:.1f} ms, and the operators of this project "
        f"{groups['operators']['ms']:.1f} ms",
        f"operators add up to {total / step:.0%} of a step",
        f"operators together take {groups['operators']['ms'] / total:.1%} of a step",
        f"GELU alone takes {gelu['ms']:.1f} ms of a step",
        f"instead of {sum(row['ms'] for row in norms):.1f} on the H200",
        f"has {sum(row['gbytes'] for row in sums):.1f} GB at H/14 for the same kernels, which take {summed:.1f} ms of "
        f"{total:.0f} ({summed / total:.1%};",
    ]  # fmt: skip


def other_phrases() -> list[str]:
    operators = [row for row in read("operators")["rows"] if row["provider"] == "triton"]
    gains = [row["speed_vs"]["compile"] for row in operators]
    own = {row["operator"]: row for row in operators}
    names = [f"{name}_neighbors" for name in ("select", "aggregate", "pool")]
    eager = sum(
        row["ms"] for row in read("operators")["rows"] if row["provider"] == "eager" and row["operator"] in names
    )
    times_eager = eager / sum(own[name]["ms"] for name in names)
    cudnn, xformers = (row for row in read("teacher-cudnn")["rows"])
    rows = page.pivot(read("attention")["rows"], ("head_size", "length"), "kernel", ("ms", "first_ms"))
    shares = [row["ms/cudnn"] / min(row["ms/xformers"], row["ms/sdpa"]) for row in rows]
    alike = max(abs(row["ms/xformers"] / row["ms/sdpa"] - 1) for row in rows)
    first = [row["first_ms/cudnn"] / 1e3 for row in rows]
    tests = read("summary")["tests"]
    counts = [int(tests[f"{name}-tests"].split()[0]) for name in ("operator", "training", "other")]
    return [
        f"together take 1/{math.floor(times_eager)} of the time of eager PyTorch",
        f"({min(gains):.2f}x to {max(gains):.1f}x)",
        f"that of `gather_tokens` is met ({own['gather_tokens']['of_copy']:.0%})",
        f"from its prediction: {1e3 * own['select_neighbors']['ms']:.0f} µs",
        f"the teacher took {cudnn['phases_ms']['targets']:.1f} ms instead of {xformers['phases_ms']['targets']:.1f}, "
        f"the step {cudnn['ms']:.1f} instead of {xformers['ms']:.1f}",
        f"differ by less than {math.ceil(1e3 * alike) / 10}%",
        f"cuDNN takes {min(shares):.2f} to {max(shares):.2f} of their time",
        f"{min(first):.1f} to {max(first):.1f} s for the first call",
        f"{counts[0]} of operators, {counts[1]} of training, {counts[2]} of models",
    ]


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join((ROOT / "docs/performance.md").read_text().split())


@pytest.mark.parametrize("phrases", [step_phrases, profile_phrases, other_phrases])
def test_numbers_of_the_h200_are_those_of_its_files(text, phrases):
    assert not [phrase for phrase in phrases() if phrase not in text]


def test_sections_of_the_h200_have_no_other_measured_numbers():
    whole = (ROOT / "docs/performance.md").read_text()
    phrases = [*step_phrases(), *profile_phrases(), *other_phrases(), *NOT_MEASURED]
    for title in SECTIONS:
        section = " ".join(re.search(rf"### {title}\n(.*?)\n##", whole, re.S)[1].split())
        for phrase in phrases:
            section = section.replace(phrase, "")
        assert not re.findall(r"\d[\d.,]*(?:%|x\b| ms\b| s\b| µs\b| GiB\b| TFLOP/s)", section), section
