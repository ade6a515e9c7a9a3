"""Tables and plots of the results in a folder: mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runner import RESULT, read_result
from experiments.table import TableError

NEIGHBORS = "20"
"""k of the k-NN accuracy in tables: fixed beforehand, so that no variant is shown at a k of its own."""

Result = dict[str, Any]


def _of_report(section: str, *keys: str, scale: float = 100) -> Callable[[Result, str], float | None]:
    """A number in the report for one kind of features, in percent."""

    def read(result: Result, features: str) -> float | None:
        value: Any = result["report"].get(section, {}).get(features)
        for key in keys:
            value = None if value is None else value.get(key)
        return None if value is None else scale * value

    return read


def _with_layout(result: Result, features: str) -> float | None:
    return _of_report("knn" if features == "pixels" else "knn_layout", NEIGHBORS)(result, features)


def _of_metrics(name: str) -> Callable[[Result, str], float | None]:
    """The mean over the last tenth of the rows of metrics.jsonl that have a value, in percent."""

    def read(result: Result, features: str) -> float | None:
        values = [row[name] for row in result.get("metrics", []) if row.get(name) is not None]
        if features != "trained" or not values:
            return None
        return 100 * statistics.mean(values[-max(1, len(values) // 10) :])

    return read


# What a table shows: a number of a result for one kind of features, `trained`, `untrained` or `pixels`.
METRICS: dict[str, Callable[[Result, str], float | None]] = {
    f"k-NN, k = {NEIGHBORS}": _of_report("knn", NEIGHBORS),
    "with layout": _with_layout,
    "linear": _of_report("linear"),
    "mIoU": _of_report("segmentation", "mean_iou"),
    "centred rank": _of_report("collapse", "effective_rank_centered", scale=1),
    "explained": _of_metrics("targets/explained_variance"),
    "between images": _of_metrics("targets/variance_between_images"),
}
CURVES = ("targets/explained_variance", "eval/knn_20", "eval/linear", "eval/miou")
"""Metrics that are drawn over steps."""


def read_results(source: Path) -> list[Result]:
    """The results of all runs below a folder, or in a published file, those of the lowest seeds first.

    Raises:
        TableError: there are none.
    """
    if not source.exists():
        raise TableError(f"{source} does not exist; give the --out of python -m experiments run or publish")
    if source.is_file():
        try:
            results = json.loads(source.read_text())["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise TableError(f"{source} is no file of python -m experiments publish") from error
    else:
        results = [read_result(path) for path in sorted(source.glob(f"*/{RESULT}"))]
    if not results:
        raise TableError(f"{source} holds no result yet; give the --out of python -m experiments run or publish")
    return sorted(results, key=lambda result: result["seed"])


def collect(results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """The values of each metric over seeds: row -> metric -> values. Rows are variants, `untrained` and `pixels`.

    The untrained network of a seed is the same for all variants of one architecture; each is counted once.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        _add(rows, result["variant"], result, "trained")
    for features in ("untrained", "pixels"):
        seen: list[dict[str, float | None]] = []
        for result in results:
            values = {name: read(result, features) for name, read in METRICS.items()}
            if values not in seen:
                seen.append(values)
                _add(rows, features, result, features)
    return rows


def _add(rows: dict[str, dict[str, list[float]]], row: str, result: Result, features: str) -> None:
    for name, read in METRICS.items():
        value = read(result, features)
        if value is not None:
            rows.setdefault(row, {}).setdefault(name, []).append(value)


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table: mean and standard deviation over seeds of each variant, the untrained network and pixels."""
    rows = collect(results)
    names = [name for name in METRICS if any(name in row for row in rows.values())]
    lines = [["", "seeds", "steps", "minutes", "processor ms/step", *names]]
    for row, values in rows.items():
        of_row = [result for result in results if result["variant"] == row]
        steps = "/".join(map(str, sorted({result["steps"] for result in of_row}))) or "-"
        minutes = f"{statistics.mean(r['train_seconds'] for r in of_row) / 60:.0f}" if of_row else "-"
        processor = [1000 * cost for r in of_row if (cost := r.get("processor_seconds_per_step")) is not None]
        count = max(map(len, values.values()))
        spreads = [format_spread(values.get(name, [])) for name in names]
        lines.append([row, str(count), steps, minutes, format_spread(processor), *spreads])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` of some values; of one value, the value."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def save_plot(results: Sequence[Result], path: Path) -> None:
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


def save_curves(results: Sequence[Result], path: Path) -> bool:
    """Draw what was measured during training over steps: a line for each run, a colour for each variant.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    names = [name for name in CURVES if any(name in row for result in results for row in result.get("metrics", []))]
    if not names:
        return False
    variants = list(dict.fromkeys(result["variant"] for result in results))
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for result in results:
            rows = [row for row in result.get("metrics", []) if row.get(name) is not None]
            color = f"C{variants.index(result['variant'])}"
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], color=color, alpha=0.7)
        axes.set_title(name)
        axes.set_xlabel("step")
    for place, variant in enumerate(variants):
        axes.plot([], [], color=f"C{place}", label=variant)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True
