"""One page of tables from files of results, so that no measured number is typed.

    python -m benchmarks.page benchmarks/results/nvidia-h200-2026-11-26-*.json > docs/h200.md

The program of a file is read from its command; files of other programs than those below are refused. `gpu_check` writes
the same page beside its results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.goals import decide
from benchmarks.predictions import OPERATORS_HUGE, PREDICTIONS, kernel_groups
from benchmarks.step import profile, runs, speed
from benchmarks.tables import number
from benchmarks.workloads import parse_workload

Columns = dict[str, Callable[[dict], str]]
NUM_OPERATORS = 25  # of a profile, those that take most time
# Names of operators in a profile, by the groups of `predictions.kernel_groups`; the first that fits counts.
PROFILED = {
    "all products": r"aten::(addmm|mm|bmm)$",
    "attention": r"aten::_flash_attention",
    "LayerNorm and residual": r".*native_layer_norm|triton_poi_fused_add_view",
    "qkv gradients": r"triton_poi_fused_stack",
    "bias gradients": r"triton_(red|per)_fused_.*sum|aten::sum$",
    "GELU": r".*gelu",
    "update": r"aten::(_fused_adamw_|_foreach_|_chunk_cat|copy_)",
    "operators": r"(GeneratedBackwardFor_)?dmtjepa",
    "others": "",
}
PRODUCTS = r"(teacher|student): |heads and embeddings"


def markdown_table(columns: Columns, rows: Sequence[dict], num_names: int) -> list[str]:
    """Lines of a table, with numbers aligned right."""
    marks = ["---"] * num_names + ["---:"] * (len(columns) - num_names)
    lines = [list(columns), marks, *([cell(row) for cell in columns.values()] for row in rows)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def pivot(rows: Sequence[dict], keys: Sequence[str], name: str, values: Sequence[str]) -> list[dict]:
    """One row for each combination of `keys`, which holds `<value>/<row[name]>` for all rows that have it."""
    found: dict[tuple, dict] = {}
    for row in rows:
        combination = tuple(row[key] for key in keys)
        joined = found.setdefault(combination, dict(zip(keys, combination, strict=True)))
        joined |= {f"{value}/{row[name]}": row[value] for value in values if row.get("correct") and value in row}
    return list(found.values())


def predicted(kind: str) -> Callable[[dict], str]:
    """A column with the predicted milliseconds of a step of this project on an H100."""

    def cell(row: dict) -> str:
        prediction = next((p for name, p in PREDICTIONS.items() if matches(name, row["workload"])), None)
        if prediction is None or not row["provider"].startswith("project bfloat16 compiled"):
            return "-"
        return "-" if "fp8" in row["provider"] else f"{1e3 * getattr(prediction, kind)['H100']:.0f}"

    return cell


def matches(name: str, workload: str) -> bool:
    """Whether "ViT-H/14" is the model of a workload such as "ViT-huge/14 B=128"."""
    letter, patch = re.fullmatch(r"ViT-(\w)/(\d+)", name).groups()
    return re.match(rf"ViT-{letter.lower()}\w*/{patch}\b", workload) is not None


def step_tables(document: dict) -> Iterator[list[str]]:
    predictions = {"H100 predicted: ceiling": predicted("seconds"), "with kernels": predicted("with_kernels")}
    yield markdown_table(speed.COLUMNS | predictions, document["rows"], 2)
    yield ["Milliseconds of its phases:"]
    yield markdown_table(speed.PHASE_COLUMNS, document["rows"], 2)


def profile_tables(document: dict) -> Iterator[list[str]]:
    yield [
        f"{document['workload']}, {document['provider']}: {document['ms_profiled']:.1f} ms a step while it was "
        f"profiled. Ceilings: {document['product_tflop_per_s']:.0f} TFLOP/s, {document['copy_gb_per_s']:.0f} GB/s."
    ]
    yield markdown_table(profile.COLUMNS, document["rows"][:NUM_OPERATORS], 1)
    for text in ("vit_huge:128", "vit_base:256"):
        yield from group_tables(document, text)


def group_tables(document: dict, text: str) -> Iterator[list[str]]:
    """The groups of a step of the workload `text`, predicted for an H100, beside the profile if that is of it."""
    workload = parse_workload(text)
    steps = range(runs.CHECKED_STEPS, runs.CHECKED_STEPS + 3)  # those of a profile
    rows = [
        {"name": group.name, "flops": group.flops, "bytes": group.bytes, "kernel_bytes": group.kernel_bytes}
        | {"ceiling": group.seconds(with_kernels=False), "kernels": group.seconds(with_kernels=True)}
        for group in kernel_groups(workload, steps)
    ]
    products = [row for row in rows if re.match(PRODUCTS, row["name"])]
    rows.append(sum_rows("all products", products))
    if text == "vit_huge:128":
        seconds = sum(OPERATORS_HUGE.values()) / 1e6
        rows.append({"name": "operators", "ceiling": seconds, "kernels": seconds})
    total = sum_rows("all", [row for row in rows if row["name"] != "all products"])
    profiled = document["rows"] if document["workload"] == workload.name else []
    measured = profile_groups(profiled)
    rows.append({"name": "others"})
    for row in rows:
        row |= measured.get(row["name"], {})
    if profiled:
        total["ms"] = sum(row["ms"] for row in profiled)
    columns: Columns = {
        "group": lambda row: row["name"],
        "GFLOP": number("flops", "{:.0f}", 1e-9),
        "GB": number("bytes", "{:.1f}", 1e-9),
        "with kernels": number("kernel_bytes", "{:.1f}", 1e-9),
        "H100 predicted, ms: ceiling": number("ceiling", "{:.1f}", 1e3),
        "with kernels, ms": number("kernels", "{:.1f}", 1e3),
        "measured, GFLOP": number("gflop", "{:.0f}"),
        "measured, ms": number("ms", "{:.1f}"),
    }
    yield [
        f"**Predictions by groups of kernels** for {workload.name} on an H100, means of {len(steps)} steps "
        "(bytes of heads and embeddings are not counted)"
        + (", beside the profile above:" if profiled else "; it has not been profiled:")
    ]
    yield markdown_table(columns, [*rows, total], 1)


def sum_rows(name: str, rows: Sequence[dict]) -> dict:
    keys = ("flops", "bytes", "kernel_bytes", "ceiling", "kernels")
    return {"name": name} | {key: sum(row.get(key, 0.0) for row in rows) for key in keys}


def profile_groups(rows: Sequence[dict]) -> dict[str, dict]:
    """Milliseconds and GFLOP of the operators of a profile by the groups of `PROFILED`."""
    found: dict[str, dict] = {}
    for row in rows:
        name = next(name for name, pattern in PROFILED.items() if re.match(pattern, row["operator"]))
        group = found.setdefault(name, {"ms": 0.0, "gflop": None})
        group["ms"] += row["ms"]
        if row["gflop"]:
            group["gflop"] = (group["gflop"] or 0.0) + row["gflop"]
    return found


def attention_tables(document: dict) -> Iterator[list[str]]:
    names = list(dict.fromkeys(row["kernel"] for row in document["rows"]))
    columns: Columns = {"head size": number("head_size", "{:.0f}"), "length": number("length", "{:.0f}")}
    columns |= {f"forward, {name}": number(f"forward_ms/{name}", "{:.3f}") for name in names}
    columns |= {f"both, {name}": number(f"ms/{name}", "{:.3f}") for name in names}
    columns |= {f"first, {name}": number(f"first_ms/{name}", "{:.0f}") for name in names}
    first = document["rows"][0]
    yield [
        f"Milliseconds of {first['batch']} sequences with {first['heads']} heads: a forward pass, both passes, and the "
        "first call of a shape (both passes)."
    ]
    yield markdown_table(
        columns, pivot(document["rows"], ("head_size", "length"), "kernel", ("forward_ms", "ms", "first_ms")), 2
    )


def operator_tables(document: dict) -> Iterator[list[str]]:
    rows = pivot(document["rows"], ("workload", "operator", "unique_bytes"), "provider", ("ms", "of_copy"))
    for row in rows:
        if {"ms/triton", "ms/compile"} <= set(row):
            row["speed"] = row["ms/compile"] / row["ms/triton"]
        if row["workload"] == "ViT-huge/14 B=128":
            row["predicted"] = OPERATORS_HUGE.get(row["operator"])
    columns: Columns = {
        "workload": lambda row: row["workload"],
        "operator": lambda row: row["operator"],
        "MB": number("unique_bytes", "{:.0f}", 1e-6),
        "µs": number("ms/triton", "{:.0f}", 1e3),
        "predicted (H100)": number("predicted", "{:.0f}"),
        "share of copy": number("of_copy/triton", "{:.0%}"),
        "eager PyTorch": number("ms/eager", "{:.0f}", 1e3),
        "torch.compile": number("ms/compile", "{:.0f}", 1e3),
        "speed against torch.compile": number("speed", "{:.2f}x"),
    }
    yield [f"A copy of 1 GiB reaches {document['copy_gb_per_s']:.0f} GB/s."]
    yield markdown_table(columns, rows, 2)


def check_tables(document: dict) -> Iterator[list[str]]:
    tests = document.get("tests", {})
    columns: Columns = {
        "step": lambda row: row["name"],
        "command": lambda row: f"`{row['command']}`",
        "seconds": number("seconds", "{:.0f}"),
        "exit status": lambda row: "stopped" if row["return_code"] is None else str(row["return_code"]),
        "": lambda row: tests.get(row["name"], ""),
    }
    yield markdown_table(columns, document["steps"], 2)


TABLES: dict[str, tuple[str, Callable[[dict], Iterator[list[str]]]]] = {
    "benchmarks.gpu_check": ("Steps of the check", check_tables),
    "benchmarks.step.speed": ("The whole step", step_tables),
    "benchmarks.step.profile": ("Operators of a step", profile_tables),
    "benchmarks.step.attention": ("Attention kernels", attention_tables),
    "benchmarks.operators.speed": ("Operators of this project", operator_tables),
}


def make_page(documents: dict[str, dict]) -> str:
    """Markdown of documents by the names of their files. Raises ValueError for a document of an unknown program."""
    hardware = {document["hardware"] for document in documents.values()}
    if len(hardware) != 1:
        raise ValueError(f"a page describes one GPU; these files are of {len(hardware)}: {', '.join(sorted(hardware))}")
    name = hardware.pop()
    lines = [
        f"# Measured on {'an ' if name.startswith('NVIDIA') else ''}{name}",
        "",
        "`python -m benchmarks.page FILES` makes this page from files in `benchmarks/results`.",
        "[performance.md](performance.md) explains the programs and what the numbers mean.",
    ]
    programs = {file: find_program(document) for file, document in documents.items()}
    if unknown := [file for file, program in programs.items() if program is None]:
        raise ValueError(f"no table for {', '.join(unknown)}: their commands run none of {', '.join(TABLES)}")
    order = list(TABLES)
    for file, document in sorted(documents.items(), key=lambda item: (order.index(programs[item[0]]), item[0])):
        title, tables = TABLES[programs[file]]
        if list(programs.values()).count(programs[file]) > 1:
            title = f"{title}: {short_name(file)}"
        lines += ["", f"## {title}", "", *provenance(file, document)]
        for table in tables(document):
            lines += ["", *table]
    for commit, goals in goals_by_commit(documents).items():
        lines += ["", f"## Goals, at commit {commit[:7]}", "", "| | goal |", "|---|---|"]
        lines += [f"| {'met' if met else '**missed**'} | {goal} |" for goal, met in goals.items()]
    return "\n".join(lines) + "\n"


def find_program(document: dict) -> str | None:
    """The program that wrote a document; None if there is no table for it."""
    found = re.search(r"-m (benchmarks\.[\w.]+)", document.get("command", ""))
    return found[1] if found is not None and found[1] in TABLES else None


def short_name(file: str) -> str:
    """What follows hardware and date in the name of a file."""
    return re.sub(r"^.*\d{4}-\d\d-\d\d-", "", file.removesuffix(".json"))


def provenance(file: str, document: dict) -> list[str]:
    """File, command, versions and commit."""
    changes = " with uncommitted changes" if document["uncommitted_changes"] else ""
    commit = f"{(document['commit'] or 'unknown')[:7]}{changes}"
    lines = [
        f"`{document['command']}`",
        "",
        f"`{file}`: {document['date']}, commit {commit}, torch {document['torch']}, triton {document['triton']}, "
        f"Python {document['python']}.",
    ]
    return [*lines, "", f"Note: {document['note']}."] if "note" in document else lines


def goals_by_commit(documents: dict[str, dict]) -> dict[str, dict[str, bool]]:
    """The goals that the rows of each commit decide."""
    rows: dict[str, list[dict]] = {}
    for _, document in sorted(documents.items()):
        correct = [row for row in document.get("rows", []) if row.get("correct", True)]
        rows.setdefault(document["commit"] or "unknown", []).extend(correct)
    return {commit: goals for commit, found in rows.items() if (goals := decide(found))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    try:
        sys.stdout.write(make_page({path.name: json.loads(path.read_text()) for path in options.files}))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
