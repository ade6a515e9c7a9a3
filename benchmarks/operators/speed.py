"""Time of every operator at the shapes of training, in one table, one file and one plot.

    python -m benchmarks.operators.speed [--operators gather_tokens ...] [--workloads vit_huge:128 ...]
                                         [--dtype bfloat16] [--out FOLDER]

On a GPU the Triton kernels and plain PyTorch, eager and compiled, are timed; without one, the CPU implementation and
plain PyTorch. `of copy` is the share of the measured copy bandwidth that an operator reaches on its unique bytes; the
module of each operator in benchmarks/operators says which bytes these are. A result that differs from the reference is
not timed, and the program exits with 1.
"""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path

import torch

from benchmarks.machine import copy_bandwidth, default_device, milliseconds
from benchmarks.operators import OPERATORS
from benchmarks.operators.cases import Case
from benchmarks.tables import add_time_anyway, number, save, text_table
from benchmarks.workloads import OFFICIAL_WORKLOADS, add_workloads, chosen_workloads


def measure(case: Case, name: str, reference: object, device: str, time_anyway: bool = False) -> dict:
    """The row of one provider. One that fails has an error and no time; nor has one that fails the gate, unless
    `time_anyway`."""
    row = {"operator": case.name, "provider": name, "unique_bytes": case.unique_bytes, "correct": False}
    try:
        provider = case.provider(name)
        row |= {"error": case.error(provider(*case.arguments), reference), "limit": case.limit}
        row["correct"] = row["error"] <= case.limit  # False for a NaN, too
        if not row["correct"]:
            timed = "timed anyway" if time_anyway else "not timed"
            row |= {"problem": f"WRONG: error {row['error']:.2e} above {case.limit:.2e}, {timed}"}
            if not time_anyway:
                return row
        row["ms"] = milliseconds(lambda: provider(*case.arguments), device)
    except Exception as error:
        traceback.print_exc()
        return row | {"correct": False, "problem": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    gb_per_s = case.unique_bytes / row["ms"] / 1e6
    return row | {"gb_per_s": gb_per_s, "of_copy": 1e9 * gb_per_s / copy_bandwidth(device)}


def with_speeds(rows: list[dict]) -> list[dict]:
    """The rows in the order of their operators, each with its speed against eager and compiled PyTorch."""
    times = {(row["workload"], row["operator"], row["provider"]): row["ms"] for row in rows if "ms" in row}
    order = {(row["workload"], row["operator"]): place for place, row in reversed(list(enumerate(rows)))}
    found = []
    for row in sorted(rows, key=lambda row: order[row["workload"], row["operator"]]):
        theirs = {name: times.get((row["workload"], row["operator"], name)) for name in ("eager", "compile")}
        speeds = {name: ms / row["ms"] for name, ms in theirs.items() if ms and "ms" in row}
        found.append(row | {"speed_vs": speeds})
    return found


COLUMNS = {
    "operator": lambda row: row["operator"],
    "workload": lambda row: row["workload"],
    "provider": lambda row: row["provider"],
    "ms": number("ms", "{:.3f}"),
    "GB/s": number("gb_per_s", "{:.0f}"),
    "of copy": number("of_copy", "{:.0%}"),
    "vs eager": lambda row: number("eager", "{:.2f}x")(row.get("speed_vs", {})),
    "vs compile": lambda row: number("compile", "{:.2f}x")(row.get("speed_vs", {})),
    "": lambda row: row.get("problem", ""),
}


def plot(axes, rows: list[dict]) -> None:
    """Each provider's share of the copy bandwidth."""
    rows = [row for row in rows if row["correct"]][::-1]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["provider"] for row in rows))}
    labels = [f"{row['operator']}, {row['workload']}, {row['provider']}" for row in rows]
    axes.barh(labels, [row["of_copy"] for row in rows], color=[colors[row["provider"]] for row in rows])
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("unique bytes per second over the bandwidth of a copy")


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    add_workloads(parser, OFFICIAL_WORKLOADS if device == "cuda" else ["vit_base:8"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    add_time_anyway(parser)
    options = parser.parse_args()

    if device == "cpu":
        print("No CUDA device: these are times of the CPU implementations and say nothing about the Triton kernels.")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    torch.manual_seed(0)
    operators = [OPERATORS[name] for name in options.operators]
    gb_per_s = copy_bandwidth(device) / 1e9
    rows: list[dict] = []
    for workload in chosen_workloads(options):
        cases = [case for make_cases in operators for case in make_cases(workload, device, dtype)]
        expected = [case.reference(*case.arguments) for case in cases]
        # What torch.compile makes comes last: it takes minutes, and the rest is worth having without it.
        for names in (("triton", "eager"), ("compile",)) if device == "cuda" else (("cpu", "eager"),):
            for case, reference in zip(cases, expected, strict=True):
                for provider in names:
                    row = measure(case, provider, reference, device, options.time_anyway)
                    rows.append({**workload.description, "dtype": str(dtype), **row})
                rows = with_speeds(rows)
                save(options.out, "operators", device, rows, copy_gb_per_s=gb_per_s)
    print(f"copy: {gb_per_s:.0f} GB/s\n{text_table(COLUMNS, rows, num_names=3)}")
    save(options.out, "operators", device, rows, plot=plot, copy_gb_per_s=gb_per_s)
    if not all(row["correct"] for row in rows if row["provider"] != "compile"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
