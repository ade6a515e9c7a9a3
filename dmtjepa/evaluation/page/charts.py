"""Line charts as a template draws them: positions in an SVG drawing, whose colours are those of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtjepa.step_csv import LossCurve

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
"""Margins of a chart, in the units of its drawing; they hold the labels of the ticks."""
MAX_POINTS = 400
"""A line with more points shows means of neighbouring ones."""
SMOOTHING = 0.03
"""A smoothed line averages over this share of a line, if that has at least `MIN_SMOOTHED` points."""
MIN_SMOOTHED = 40


@dataclass(frozen=True)
class Quantity:
    """What a chart shows: a name in `metrics.jsonl`, its title, and how it is written.

    noisy: a pale line shows the values, and a strong one their running mean.
    """

    name: str
    title: str
    scale: float = 1.0
    unit: str = ""
    noisy: bool = False


QUANTITIES = (
    Quantity("train/loss", "Loss", noisy=True),
    Quantity("targets/explained_variance", "Explained variance of the targets", 100, "%", noisy=True),
    Quantity("context/explained_variance", "Explained variance of the visible patches", 100, "%", noisy=True),
    Quantity("features/effective_rank", "Effective rank of the features"),
    Quantity("train/lr", "Learning rate"),
    Quantity("train/images_per_second", "Images per second", noisy=True),
    Quantity("train/data_wait", "Time without data", 100, "%", noisy=True),
    Quantity("eval/knn_20", "k-NN accuracy during training, k = 20", 100, "%"),
    Quantity("eval/linear", "Linear probe during training", 100, "%"),
    Quantity("eval/miou", "Segmentation during training, mean IoU", 100, "%"),
)


@dataclass(frozen=True)
class Line:
    """Values of a quantity: `steps` and `values`, both [n]. A value that is not known is NaN. `color` is a number."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    color: int = 0


@dataclass(frozen=True)
class Stroke:
    """A line as it is drawn: the points of its connected parts, `x,y x,y ...`; and points that stand alone."""

    label: str
    color: int
    faint: bool
    parts: list[str]
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart as it is drawn. Ticks are (position, label). `last` are the last values by the label of the line."""

    title: str
    strokes: list[Stroke]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: list[tuple[str, int, str]]
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def read_lines(
    rows: Sequence[Mapping[str, Any]], losses: LossCurve | None = None, label: str = "", color: int = 0
) -> dict[str, Line]:
    """The lines of a run by the name of their quantity; those without values are left out.

    Args:
        rows: of `metrics.jsonl`.
        losses: of every step, shown if `rows` has no loss.
        label, color: of the lines.
    """
    lines = {}
    for quantity in QUANTITIES:
        found = [(row["step"] + 1, row[quantity.name]) for row in rows if _is_number(row.get(quantity.name))]
        if found:
            steps, values = np.array(found, dtype=float).T
            lines[quantity.name] = Line(label, steps, quantity.scale * values, color)
    if "train/loss" not in lines and losses is not None and np.isfinite(losses.loss).any():
        lines["train/loss"] = Line(label, np.arange(1.0, len(losses.loss) + 1), losses.loss, color)
    return lines


def make_charts(runs: Sequence[Mapping[str, Line]]) -> list[Chart]:
    """A chart for each quantity that at least one run has, with a line for each of them.

    Args:
        runs: what `read_lines` gives, of each run.
    """
    found = [(quantity, [run[quantity.name] for run in runs if quantity.name in run]) for quantity in QUANTITIES]
    return [make_chart(quantity, lines) for quantity, lines in found if lines]


def make_chart(quantity: Quantity, lines: Sequence[Line]) -> Chart:
    """Draw lines over each other. A few values that are far from the others may leave the chart."""
    from matplotlib.ticker import MaxNLocator  # slow to import

    values = [(line.label, line.color, format_value(line.values, quantity.unit)) for line in lines]
    lines = [_thin(line) for line in lines]
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    low, high = _find_limits(np.concatenate([line.values for line in lines]), robust=quantity.noisy)
    x_ticks = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True).tick_values(first, last)
    y_ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)

    def place_x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(last - first, 1), 1)

    def place_y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    strokes = []
    for line in lines:
        smooth = _smooth(line) if quantity.noisy and len(line.steps) >= MIN_SMOOTHED else None
        if smooth is None or len(lines) == 1:  # values of several runs would hide each other
            strokes.append(_draw(line, place_x, place_y, faint=smooth is not None))
        if smooth is not None:
            strokes.append(_draw(smooth, place_x, place_y, faint=False))
    summary = f"{quantity.title}: last value " + ", ".join(f"{label} {value}".strip() for label, _, value in values)
    return Chart(
        quantity.title,
        strokes,
        [(place_x(tick), _format_step(tick)) for tick in x_ticks if first <= tick <= last],
        [(place_y(tick), f"{tick:.4g}{quantity.unit}") for tick in y_ticks if low <= tick <= high],
        values,
        summary,
    )


def format_value(values: np.ndarray, unit: str) -> str:
    """The last value that is known."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    return f"{known[-1]:.1f}{unit}" if unit else f"{known[-1]:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _thin(line: Line) -> Line:
    """At most `MAX_POINTS` points: means of neighbouring ones."""
    if len(line.steps) <= MAX_POINTS:
        return line
    starts = np.linspace(0, len(line.steps), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(line.steps)))
    steps, values = (np.add.reduceat(array, starts) / counts for array in (line.steps, line.values))
    return Line(line.label, steps, values, line.color)


def _smooth(line: Line) -> Line:
    """The running mean, without the ends, where its window reaches beyond the line."""
    width = max(5, round(SMOOTHING * len(line.steps)))
    window = np.ones(width) / width
    return Line(
        line.label,
        np.convolve(line.steps, window, "valid"),
        np.convolve(line.values, window, "valid"),
        line.color,
    )


def _find_limits(values: np.ndarray, *, robust: bool) -> tuple[float, float]:
    """The range of a chart; if `robust`, without the most extreme values, such as the losses of the first steps."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = np.quantile(known, [0.02, 0.98]) if robust and len(known) >= 20 else (known.min(), known.max())
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    bottom = low - margin
    return float(0.0 if bottom < 0 <= known.min() else bottom), float(high + margin)


def _draw(line: Line, place_x: Any, place_y: Any, *, faint: bool) -> Stroke:
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(line.steps.tolist(), line.values.tolist(), strict=True):
        if not np.isfinite(value):
            parts.append([])
        else:
            parts[-1].append((place_x(step), min(max(place_y(value), -1e4), 1e4)))
    return Stroke(
        line.label,
        line.color,
        faint,
        [" ".join(f"{x:g},{y:g}" for x, y in part) for part in parts if len(part) > 1],
        [part[0] for part in parts if len(part) == 1],
    )


def _format_step(step: float) -> str:
    if step >= 10_000:
        return f"{step / 1000:g}k"
    return f"{step:g}"
