"""The contents of a report, and the table and the sentences that are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmtjepa.evaluation.gains import accuracy_error, describe_gains

WITH_LAYOUT = ", with layout"
"""Ends the names of features that keep the layout of the image, where they stand beside pooled ones."""


@dataclass
class Report:
    """What was measured. Accuracies are shares from 0 to 1. What was not measured is empty.

    run, data: what was measured, and on which images.
    knn, knn_plain, linear, attentive, collapse, segmentation: results by the name of the features: `trained` (of the
        teacher), `student`, `start` (of weights that the run started from), `untrained` or `pixels`. The keys of the
        k-NN results are k; `knn` weights its votes, `knn_plain` does not.
    knn_layout: k-NN results of features that keep the layout of the image, as pixels do.
    protocols: accuracies by the protocols of papers: name of the protocol -> name of the features -> accuracy.
    low_shot: accuracies with few labels: which labels -> name of the features -> mean, std, num_images.
    loss: number of logged steps, first and last loss.
    verdict: what the figures of the training say, see `dmtjepa.evaluation.verdict`.
    notes: what limits the results, such as classes without images.
    skipped: what was not measured, and why.
    files: the files of the report.
    """

    run: dict[str, Any]
    data: dict[str, Any]
    knn: dict[str, dict[int, float]] = field(default_factory=dict)
    knn_plain: dict[str, dict[int, float]] = field(default_factory=dict)
    knn_layout: dict[str, dict[int, float]] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)
    attentive: dict[str, float] = field(default_factory=dict)
    protocols: dict[str, dict[str, float]] = field(default_factory=dict)
    low_shot: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    collapse: dict[str, dict[str, float]] = field(default_factory=dict)
    segmentation: dict[str, dict[str, float]] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False
    verdict: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def format_table(report: Report) -> str:
    """The accuracies as plain text: a line per kind of features, a column per k and per probe. Empty without them."""
    ks = list(next(iter(report.knn.values()), {}))
    header = ["features", *(f"k-NN k={k}" for k in ks)]
    header += ["linear"] * bool(report.linear) + ["attentive"] * bool(report.attentive)
    header += ["mIoU"] * bool(report.segmentation)
    lines = [header]
    for name in ("trained", "student", "start", "untrained", "pixels"):
        scores = [report.knn[name][k] if name in report.knn else None for k in ks]
        scores += [report.linear.get(name)] * bool(report.linear)
        scores += [report.attentive.get(name)] * bool(report.attentive)
        scores += [report.segmentation.get(name, {}).get("mean_iou")] * bool(report.segmentation)
        if any(score is not None for score in scores):
            lines.append([name, *("-" if score is None else f"{100 * score:.1f}" for score in scores)])
    for name, values in report.knn_layout.items():
        cells = [f"{100 * values[k]:.1f}" for k in ks]
        lines.append([name + WITH_LAYOUT, *cells, *"-" * (len(header) - 1 - len(ks))])
    if len(lines) == 1:
        return ""
    return align_columns(lines)


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_verdict(report: Report) -> list[str]:
    """Sentences on the gain over the baselines, on collapse, on the training, and on what was skipped."""
    training = [f"training: {sentence}" for sentence in report.verdict]
    return [*format_results(report), *training, *report.notes, *(f"skipped {reason}" for reason in report.skipped)]


def format_results(report: Report) -> list[str]:
    """Sentences on the gain over the baselines, and on collapse."""
    lines = []
    if report.knn:
        # Each kind of features at its own best k: the best k of the trained features alone would favour them.
        best = _best_accuracy(report.knn)
        lines.append(
            f"k-NN: {100 * best['trained']:.1f}% +- {_error(best['trained'], report)} (standard error) at the best k; "
            f"{_gain(best, 'untrained')} points against untrained, {_gain(best, 'pixels')} points against pixels"
        )
    if report.knn_layout:
        best = _best_accuracy(report.knn | report.knn_layout)
        lines.append(
            f"with layout: {100 * best['trained']:.1f}%; {_gain(best, 'untrained')} points against untrained, "
            f"{_gain(best, 'pixels')} against pixels"
        )
    if {"trained", "untrained", "pixels"} <= report.linear.keys():
        linear = report.linear
        lines.append(
            f"linear probe: {100 * linear['trained']:.1f}% +- {_error(linear['trained'], report)}; "
            f"{_gain(linear, 'untrained')} points against untrained, {_gain(linear, 'pixels')} against pixels"
        )
    if {"trained", "untrained", "pixels"} <= report.segmentation.keys():
        ious = {name: scores["mean_iou"] for name, scores in report.segmentation.items()}
        lines.append(
            f"mIoU: {100 * ious['trained']:.1f}% +- {100 * report.segmentation['trained']['mean_iou_error']:.1f}; "
            f"{_gain(ious, 'untrained')} points against untrained, {_gain(ious, 'pixels')} against pixels"
        )
    lines += _compare_with_start(report)
    if "trained" in report.collapse:
        numbers = report.collapse["trained"]
        state = "COLLAPSED: all features are nearly the same" if report.collapsed else "no sign of collapse"
        lines.append(
            f"{state}: effective rank {numbers['effective_rank']:.1f} of {numbers['num_dimensions']}, "
            f"mean cosine {numbers['mean_cosine']:.2f}"
        )
    return lines


def _compare_with_start(report: Report) -> list[str]:
    """Whether the run has improved the weights that it started from. Empty if they were drawn, or not measured."""
    num_images = report.data["validation_images"]
    accuracies = {"linear probe": report.linear, "k-NN": _best_accuracy(report.knn)}
    scores = {
        measure: {name: (value, accuracy_error(value, num_images)) for name, value in values.items()}
        for measure, values in accuracies.items()
    }
    scores["mIoU"] = {
        name: (values["mean_iou"], values["mean_iou_error"]) for name, values in report.segmentation.items()
    }
    pairs = {
        measure: (values["trained"], values["start"])
        for measure, values in scores.items()
        if {"trained", "start"} <= values.keys()
    }
    if not pairs:
        return []
    return [f"against the weights that the run started from ({report.run['start']}): {describe_gains(pairs)}"]


def _best_accuracy(accuracy: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    return {name: max(values.values()) for name, values in accuracy.items()}


def _error(accuracy: float, report: Report) -> str:
    return f"{100 * accuracy_error(accuracy, report.data['validation_images']):.1f}"


def _gain(best: Mapping[str, float], baseline: str) -> str:
    return f"{100 * (best['trained'] - best[baseline]):+.1f}"
