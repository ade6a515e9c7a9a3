"""Goals of docs/performance.md, and whether results meet them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.data.loader import NEEDS

# Least share of the measured copy bandwidth.
LEAST_SHARE = {
    "gather_tokens": 0.80,
    "embed_patches": 0.80,
    "select_neighbors": 0.70,
    "aggregate_neighbors": 0.70,
    "pool_neighbors": 0.70,
}
# Of the whole step: least speed against the official code, and least MFU.
LEAST_SPEED = {"ViT-huge": (2.0, 0.48), "ViT-large": (2.1, 0.44), "ViT-base": (2.3, 0.38)}


def goals(out: Path, commit: str | None) -> dict[str, bool]:
    """Goals that the results of `commit` in the folder `out` decide, and whether they are met."""
    rows = []
    for path in sorted(out.rglob("*.json")):
        document = json.loads(path.read_text())
        if document.get("commit") == commit:
            rows += [row for row in document.get("rows", []) if row.get("correct", True)]  # --time-anyway
    return decide(rows)


def decide(rows: list[dict]) -> dict[str, bool]:
    """Goals that rows of results decide, and whether they are met."""
    return operator_goals(rows) | target_goals(rows) | step_goals(rows) | data_goals(rows)


def operator_goals(rows: list[dict]) -> dict[str, bool]:
    timed = [row for row in rows if row.get("provider") == "triton" and "ms" in row]
    found = {}
    for row in timed:
        what = f"{row['operator']}, {row['workload']}"
        share = LEAST_SHARE.get(row["operator"].split()[0])
        if share:
            found[f"{what}: at least {share:.0%} of copy bandwidth ({row['of_copy']:.0%})"] = row["of_copy"] >= share
        if ratio := row["speed_vs"].get("compile"):
            found[f"{what}: faster than torch.compile ({ratio:.2f}x)"] = ratio > 1
    neighbors = ("select_neighbors", "aggregate_neighbors", "pool_neighbors")
    own = {row["operator"]: row["ms"] for row in timed if row["operator"] in neighbors}
    eager = {row["operator"]: row["ms"] for row in rows if row.get("provider") == "eager" and row["operator"] in own}
    if len(own) == len(eager) == 3:
        ratio = sum(eager.values()) / sum(own.values())
        found[f"selection and aggregation: at least 3x eager ({ratio:.1f}x)"] = ratio >= 3
    return found


def target_goals(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for row in rows:
        if row.get("provider") == "this project" and "time_of_reference" in row:
            speed, memory = 1 / row["time_of_reference"], row["memory_of_reference"]
            what = f"target head, {row['workload']}"
            found[f"{what}: at least 5x the reference ({speed:.1f}x)"] = speed >= 5
            found[f"{what}: at most 0.15x its memory ({memory:.2f}x)"] = memory <= 0.15
    return found


def step_goals(rows: list[dict]) -> dict[str, bool]:
    """Goals of the fastest provider of each workload, and of the float8 teacher against it."""
    found = {}
    timed = [row for row in rows if "mfu" in row and row["provider"].startswith("project")]
    for workload in dict.fromkeys(row["workload"] for row in timed):
        mine = sorted((row for row in timed if row["workload"] == workload), key=lambda row: row["images_per_s"])
        plain, fp8 = ([row for row in mine if ("fp8" in row["provider"]) == wanted] for wanted in (False, True))
        if plain and fp8:
            gain = fp8[-1]["images_per_s"] / plain[-1]["images_per_s"] - 1
            found[f"{workload}: float8 teacher at least 10% faster ({gain:+.0%})"] = gain >= 0.10
        least = LEAST_SPEED.get(workload.partition("/")[0])
        if not plain or least is None:
            continue
        row = plain[-1]
        other = "official" if "speed_vs_official" in row else "reference"
        speed, memory = row.get(f"speed_vs_{other}"), row.get(f"memory_vs_{other}")
        if speed is not None:
            found[f"{workload}: at least {least[0]}x the {other} step ({speed:.2f}x)"] = speed >= least[0]
        if memory is not None:
            found[f"{workload}: at most 0.5x the memory of the {other} step ({memory:.2f}x)"] = memory <= 0.5
        found[f"{workload}: MFU of at least {least[1]:.0%} ({row['mfu']:.1%})"] = row["mfu"] >= least[1]
    return found


def data_goals(rows: list[dict]) -> dict[str, bool]:
    """Goals of DALI against the rate at which ViT-L trains, measured or else predicted; goals of the wait for data."""
    steps = [row for row in rows if "mfu" in row and row["workload"].startswith("ViT-large")]
    need = max((row["images_per_s"] for row in steps), default=NEEDS["H100"]["ViT-L/16"])
    found = {}
    for row in rows:
        if row.get("loader", "").startswith("dali") and "images_per_second" in row:
            ratio = row["images_per_second"] / need
            found[f"{row['loader']}: at least 2x the images/s of training ViT-L ({ratio:.1f}x)"] = ratio >= 2
        if "data_wait_share" in row:
            share = row["data_wait_share"]
            found[f"{row['workload']}: waits for data in less than 2% of the time ({share:.1%})"] = share < 0.02
    return found
