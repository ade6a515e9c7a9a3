"""The main results of a report with their standard errors, and the headline that they deserve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmtjepa.evaluation.gains import accuracy_error

FEATURES = ("trained", "student", "start", "untrained", "pixels")
BASELINES = ("untrained", "pixels")


@dataclass(frozen=True)
class Value:
    """A result from 0 to 1 and its standard error over the validation images."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class Score:
    """What was measured, and the results by the name of the features."""

    measure: str
    values: dict[str, Value]


@dataclass(frozen=True)
class Headline:
    """What a report says in one sentence. `tone` is `good`, `mixed`, `bad` or `neutral`."""

    tone: str
    text: str


def list_scores(report: Mapping[str, Any]) -> list[Score]:
    """The main results of a report: of report.json, or `dataclasses.asdict` of a `Report`."""
    count = report["data"]["validation_images"]
    knn, layout = (
        {name: max(values.values()) for name, values in report.get(kind, {}).items() if values}
        for kind in ("knn", "knn_layout")
    )
    if layout and "pixels" in knn:
        layout["pixels"] = knn["pixels"]  # pixels have their layout anyway
    accuracies = {
        "k-NN, best k": knn,
        "k-NN with layout, best k": layout,
        "Linear probe": report.get("linear", {}),
        "Attentive probe": report.get("attentive", {}),
    }
    scores = [
        Score(measure, {name: Value(value, accuracy_error(value, count)) for name, value in values.items()})
        for measure, values in accuracies.items()
        if values
    ]
    segmentation = {
        name: Value(values["mean_iou"], values.get("mean_iou_error", math.nan))
        for name, values in report.get("segmentation", {}).items()
    }
    return scores + [Score("Mean IoU", segmentation)] * bool(segmentation)


def find_headline(report: Mapping[str, Any], scores: list[Score]) -> Headline:
    """Whether the trained features beat the untrained network and the pixels by two standard errors.

    The linear probe decides, without one k-NN, without labels the segmentation.
    """
    if report.get("collapsed"):
        return Headline("bad", "Collapsed: the features of all images are nearly the same")
    by_measure = {score.measure: score for score in scores}
    for measure in ("Linear probe", "k-NN, best k", "Mean IoU"):
        score = by_measure.get(measure)
        if score is not None and {"trained", *BASELINES} <= score.values.keys():
            return _compare(score)
    return Headline("neutral", "No sign of collapse. Without labels or masks, nothing was compared with a baseline")


def _compare(score: Score) -> Headline:
    trained = score.values["trained"]
    names = {"untrained": "the untrained network", "pixels": "raw pixels"}
    better: list[str] = []
    others: list[str] = []
    measure = score.measure[0].lower() + score.measure[1:]
    for baseline in BASELINES:
        other = score.values[baseline]
        clear = trained.mean - other.mean > 2 * math.hypot(trained.error, other.error)
        (better if clear else others).append(names[baseline])
    if not others:
        return Headline("good", f"Better than {' and than '.join(better)} ({measure})")
    if better:
        text = f"Better than {better[0]}, but not clearly better than {others[0]} ({measure})"
        return Headline("mixed", text)
    return Headline("bad", f"Not clearly better than {' or '.join(others)} ({measure})")
