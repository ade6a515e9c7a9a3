import numpy as np
import pytest

from dmtjepa.evaluation.page.charts import (
    HEIGHT,
    LEFT,
    MAX_POINTS,
    QUANTITIES,
    RIGHT,
    WIDTH,
    Line,
    Quantity,
    make_chart,
    make_charts,
    read_lines,
)
from dmtjepa.step_csv import LossCurve

PLAIN, NOISY = Quantity("a", "A"), Quantity("b", "B", noisy=True)


def points(part):
    return [tuple(map(float, point.split(","))) for point in part.split()]


def line(values, label="", color=0):
    return Line(label, np.arange(1.0, len(values) + 1), np.array(values, dtype=float), color)


def test_a_line_spans_the_chart():
    chart = make_chart(PLAIN, [line([3, 1, 2])])
    (stroke,) = chart.strokes
    (part,) = stroke.parts
    (x0, y0), (x1, y1), (x2, y2) = points(part)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 < y2 < y1 < HEIGHT  # the y axis points down
    assert chart.last == [("", 0, "2")]
    assert {label for _, label in chart.y_ticks} >= {"1", "2", "3"}
    assert [label for _, label in chart.x_ticks] == ["1", "2", "3"]


def test_a_gap_stays_a_gap():
    (stroke,) = make_chart(PLAIN, [line([1, 2, np.nan, 3, np.nan, 1, 2])]).strokes
    assert [len(points(part)) for part in stroke.parts] == [2, 2]
    assert len(stroke.dots) == 1


def test_long_noisy_lines_are_thinned_and_smoothed():
    noise = np.random.default_rng(0).normal(0, 1, 5000) + np.linspace(0, 10, 5000)
    chart = make_chart(NOISY, [line(noise)])
    raw, smooth = chart.strokes
    assert len(points(raw.parts[0])) == MAX_POINTS
    assert chart.last == [("", 0, f"{noise[-1]:.4g}")]  # of the line itself
    assert raw.faint
    assert not smooth.faint

    def roughness(stroke):
        return np.abs(np.diff([y for _, y in points(stroke.parts[0])])).sum()

    assert roughness(smooth) < 0.5 * roughness(raw)


def test_several_runs_share_the_axes():
    chart = make_chart(NOISY, [line(np.linspace(1, 0, 100), "one", 0), line(np.linspace(2, 1, 200), "two", 1)])
    assert [stroke.label for stroke in chart.strokes] == ["one", "two"]  # smoothed only
    ends = [points(stroke.parts[-1])[-1][0] for stroke in chart.strokes]
    assert ends[0] < 0.55 * ends[1] + LEFT
    assert chart.last == [("one", 0, "0"), ("two", 1, "1")]


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [np.nan, np.nan], [0.0, 0.0, 0.0]])
def test_lines_without_a_range_are_drawn(values):
    chart = make_chart(PLAIN, [line(values)])
    assert len(chart.strokes) == 1
    assert "nan" not in repr(chart).replace("Line", "")


def test_lines_of_a_run():
    rows = [
        {"step": 9, "train/loss": 0.5, "targets/explained_variance": None, "train/lr": True},
        {"step": 19, "train/loss": 0.4, "targets/explained_variance": 0.25, "train/data_wait": "broken"},
    ]
    lines = read_lines(rows)
    assert list(lines) == ["train/loss", "targets/explained_variance"]
    assert lines["train/loss"].steps.tolist() == [10, 20]
    assert lines["targets/explained_variance"].values.tolist() == [25]  # in percent
    assert [chart.title for chart in make_charts([lines, {}])] == [QUANTITIES[0].title, QUANTITIES[1].title]


def test_losses_of_the_csv_replace_those_that_are_missing():
    curve = LossCurve(np.array([0.0, 0.5]), np.array([2.0, 1.0]))
    assert read_lines([], curve)["train/loss"].values.tolist() == [2, 1]
    assert read_lines([{"step": 3, "train/loss": 9.0}], curve)["train/loss"].values.tolist() == [9]
    assert read_lines([], LossCurve(np.array([]), np.array([]))) == {}
