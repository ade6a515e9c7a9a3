"""Tables and plots of the results in a folder: mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runner import RESULT
from experiments.table import TableError

NEIGHBORS = "20"
"""k of the k-NN accuracy in tables: fixed beforehand, so that no variant is shown at a k of its own."""

Report = dict[str, Any]


def _percent(section: str, *keys: str) -> Callable[[Report, str], float | None]:
    """A number of a report for one kind of features, in percent."""

    def read(report: Report, features: str) -> float | None:
        value: Any = report.get(section, {}).get(features)
        for key in keys:
            value = None if value is None else value.get(key)
        return None if value is None else 100 * value

    return read


def _layout(report: Report, features: str) -> float | None:
    return _percent("knn" if features == "pixels" else "knn_layout", NEIGHBORS)(report, features)


def _rank(report: Report, features: str) -> float | None:
    return report.get("collapse", {}).get(features, {}).get("effective_rank_centered")


# What a table shows: the number of a report for one kind of features.
METRICS: dict[str, Callable[[Report, str], float | None]] = {
    f"k-NN, k = {NEIGHBORS}": _percent("knn", NEIGHBORS),
    "with layout": _layout,
    "linear": _percent("linear"),
    "mIoU": _percent("segmentation", "mean_iou"),
    "centred rank": _rank,
}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of all runs below a folder, those of the lowest seeds first. Raises TableError if there are none."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{RESULT}"))]
    if not results:
        raise TableError(f"{folder} holds no result yet; give the --out of python -m experiments run")
    return sorted(results, key=lambda result: result["seed"])


def collect(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The values of each metric over seeds: row -> metric -> values. Rows are variants, `untrained` and `pixels`.

    The untrained network of a seed is the same for all variants of one architecture; each is counted once.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        _add(rows, result["variant"], result["report"], "trained")
    for features in ("untrained", "pixels"):
        seen: list[dict[str, float | None]] = []
        for result in results:
            values = {name: read(result["report"], features) for name, read in METRICS.items()}
            if values not in seen:
                seen.append(values)
                _add(rows, features, result["report"], features)
    return rows


def _add(rows: dict[str, dict[str, list[float]]], row: str, report: Report, features: str) -> None:
    for name, read in METRICS.items():
        value = read(report, features)
        if value is not None:
            rows.setdefault(row, {}).setdefault(name, []).append(value)


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation over seeds of each variant, the untrained network and pixels."""
    rows = collect(results)
    names = [name for name in METRICS if any(name in row for row in rows.values())]
    lines = [["", "seeds", "steps", "minutes", *names]]
    for row, values in rows.items():
        of_row = [result for result in results if result["variant"] == row]
        steps = "/".join(map(str, sorted({result["steps"] for result in of_row}))) or "-"
        minutes = f"{statistics.mean(r['train_seconds'] for r in of_row) / 60:.0f}" if of_row else "-"
        count = max(map(len, values.values()))
        lines.append([row, str(count), steps, minutes, *(format_spread(values.get(name, [])) for name in names)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` of some values; of one value, the value."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def save_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each metric: a point for each run, a bar at the mean, and lines for the untrained network and pixels."""
    from matplotlib.figure import Figure  # slow to import

    rows = collect(results)
    variants = list(dict.fromkeys(result["variant"] for result in results))
    names = [name for name in METRICS if any(name in rows[variant] for variant in variants)]
    figure = Figure(figsize=(3.2 * len(names), 1.5 + 0.35 * len(variants)), layout="constrained")
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(all_axes, names, strict=True):
        for place, variant in enumerate(variants):
            values = rows[variant].get(name, [])
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            if values:
                axes.plot(statistics.mean(values), place, "|", color="black", markersize=16)
        for features, style in (("untrained", "--"), ("pixels", ":")):
            values = rows.get(features, {}).get(name, [])
            if values:
                axes.axvline(statistics.mean(values), color="gray", linestyle=style, label=features)
        axes.set_title(name)
        axes.set_yticks(range(len(variants)), variants)
    all_axes[0].invert_yaxis()
    if any(rows.get(features) for features in ("untrained", "pixels")):
        all_axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
