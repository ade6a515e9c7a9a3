"""Whether a run has improved the weights that it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Measured: TypeAlias = tuple[float, float]
"""A result from 0 to 1 and its standard error."""

MEASURES = {"linear probe": "eval/linear", "k-NN": "eval/knn_20", "mIoU": "eval/miou"}
"""What is compared, by its name in messages, and where it stands in a row of `metrics.jsonl`."""
COUNTS = ("eval/train_images", "eval/images")
DIGEST = "eval/images_digest"
"""Evaluations on other images are not compared with each other. Earlier versions wrote their numbers alone."""
KEEP_START = (
    "Keep those weights, or start from them again with a lower optimization.lr and a higher first value of "
    "optimization.ema"
)


def accuracy_error(accuracy: float, num_images: int) -> float:
    """Standard error of an accuracy, a share from 0 to 1 of so many images."""
    return math.sqrt(accuracy * (1 - accuracy) / max(num_images, 1))


def judge_gain(now: Measured, start: Measured) -> str:
    """`better` or `worse` if the difference is above two of its standard errors, else `not clearly different`."""
    gain, error = _subtract(now, start)
    if abs(gain) <= 2 * error:
        return "not clearly different"
    return "better" if gain > 0 else "worse"


def describe_gains(scores: Mapping[str, tuple[Measured, Measured]]) -> str:
    """Differences in points with their standard errors, and what they mean.

    Args:
        scores: now and at the start, by the name of the measure.
    """
    parts = []
    for measure, (now, start) in scores.items():
        gain, error = _subtract(now, start)
        parts.append(f"{measure} {100 * gain:+.1f} +- {100 * error:.1f} points ({judge_gain(now, start)})")
    return ", ".join(parts)


def compare_with_start(rows: Sequence[Row]) -> list[str]:
    """What the last evaluation of a run says of the weights that it started from, as a sentence.

    Empty if these were not measured, or on other images.

    Args:
        rows: of `metrics.jsonl`.
    """
    evaluations = [row for row in rows if row.get("eval/seconds") is not None]
    if len(evaluations) < 2 or evaluations[0]["step"] >= 0 or not same_images(evaluations[0], evaluations[-1]):
        return []
    start, now = evaluations[0], evaluations[-1]
    scores = {
        measure: (measured(now, name), measured(start, name))
        for measure, name in MEASURES.items()
        if is_measured(now, name) and is_measured(start, name)
    }
    if not scores:
        return []
    text = f"Against the weights that the run started from: {describe_gains(scores)}"
    is_worse = any(judge_gain(*pair) == "worse" for pair in scores.values())
    return [f"{text}. {KEEP_START}" if is_worse else text]


def same_images(row: Row, other: Row) -> bool:
    """Whether two evaluations measured the same images, as far as their rows tell."""
    names = (*COUNTS, DIGEST) if DIGEST in row and DIGEST in other else COUNTS
    return all(row.get(name) == other.get(name) for name in names)


def is_measured(row: Row, name: str) -> bool:
    """Whether a row has the measure. The error of a mean IoU cannot be told from it; earlier versions left it out."""
    return row.get(name) is not None and (name != "eval/miou" or row.get("eval/miou_error") is not None)


def measured(row: Row, name: str) -> Measured:
    """A measure of a row that has it, and its standard error."""
    error = row.get(f"{name}_error")
    return row[name], accuracy_error(row[name], row.get("eval/images") or 0) if error is None else error


def _subtract(now: Measured, start: Measured) -> Measured:
    return now[0] - start[0], math.hypot(now[1], start[1])
