"""The contents of a report, and their text: the table and the sentences that are printed, and report.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What was measured. Accuracies are shares from 0 to 1. What was not measured is empty.

    run, data: what was measured, and on which images.
    knn, knn_plain, linear, attentive, collapse, segmentation: results by the name of the features: `trained` (of the
        teacher), `student`, `untrained` or `pixels`. The keys of the k-NN results are k; `knn` weights its votes,
        `knn_plain` does not.
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
    for name in ("trained", "student", "untrained", "pixels"):
        scores = [report.knn[name][k] if name in report.knn else None for k in ks]
        scores += [report.linear.get(name)] * bool(report.linear)
        scores += [report.attentive.get(name)] * bool(report.attentive)
        scores += [report.segmentation.get(name, {}).get("mean_iou")] * bool(report.segmentation)
        if any(score is not None for score in scores):
            lines.append([name, *("-" if score is None else f"{100 * score:.1f}" for score in scores)])
    for name, values in report.knn_layout.items():
        cells = [f"{100 * values[k]:.1f}" for k in ks]
        lines.append([f"{name}, with layout", *cells, *"-" * (len(header) - 1 - len(ks))])
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def format_verdict(report: Report) -> list[str]:
    """Sentences on the gain over the baselines, on collapse, and on what was skipped."""
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
    if "trained" in report.collapse:
        numbers = report.collapse["trained"]
        state = "COLLAPSED: all features are nearly the same" if report.collapsed else "no sign of collapse"
        lines.append(
            f"{state}: effective rank {numbers['effective_rank']:.1f} of {numbers['num_dimensions']}, "
            f"mean cosine {numbers['mean_cosine']:.2f}"
        )
    lines += [f"training: {sentence}" for sentence in report.verdict]
    return [*lines, *report.notes, *(f"skipped {reason}" for reason in report.skipped)]


def format_markdown(report: Report, figures: Sequence[str]) -> str:
    """The report as Markdown; `figures` are the names of PNG files in the same folder, the composite first."""
    lines = _format_header(report)
    for section in (
        _format_accuracy(report),
        _format_protocols(report),
        _format_low_shot(report),
        _format_segmentation(report),
        _format_collapse(report),
    ):
        if section:
            lines += ["", *section]
    if figures:
        lines += ["", "## Figures", "", f"![loss, accuracy, masks, neighbours, principal components]({figures[0]})"]
    return "\n".join(lines) + "\n"


def _format_header(report: Report) -> list[str]:
    run, data = report.run, report.data
    size = "x".join(map(str, run["image_size"]))
    epoch = f" after epoch {run['epoch']}" if run["epoch"] is not None else ""
    classes = f" of {data['classes']} classes" if data["classes"] else ""
    lines = [
        f"# Report of {run['folder']}",
        "",
        f"{run['model']}, patches of {run['patch_size']} in images of {size} pixels, {run['parameters'] / 1e6:.1f} M "
        f"parameters; teacher of `{run['checkpoint']}`{epoch}; seed {run['seed']}, torch {run['torch']}.",
        "",
        f"Data: {data['description']}: {data['train_images']} training images and {data['validation_images']} "
        f"validation images{classes}.",
        "",
        *(f"- {line}" for line in format_verdict(report)),
    ]
    if report.loss:
        lines.append(
            f"- loss {report.loss['first']:.4f} -> {report.loss['last']:.4f} over {report.loss['steps']} logged steps"
        )
    return lines


def _format_accuracy(report: Report) -> list[str]:
    if not report.knn and not report.linear:
        return []
    ks = list(next(iter(report.knn.values()), {}))
    rows = []
    for name in report.knn or report.linear:
        cells = [f"{100 * report.knn[name][k]:.1f} ({100 * report.knn_plain[name][k]:.1f})" for k in ks]
        probes = [
            f"{100 * probe[name]:.1f} ± {_error(probe[name], report)}" if name in probe else "-"
            for probe in (report.linear, report.attentive)
        ]
        rows.append([name, *cells, *probes])
    for name, values in report.knn_layout.items():
        rows.append([f"{name}, with layout", *(f"{100 * values[k]:.1f}" for k in ks), "-", "-"])
    return [
        "## Accuracy (%)",
        "",
        "Frozen, average-pooled features. `trained` is the teacher, `untrained` the same network before the first",
        "step; `pixels` is the image itself, averaged to at most 32x32. Votes are weighted with temperature 0.07 (in",
        "brackets: unweighted). ± is the standard error over the validation images.",
        "`with layout` concatenates averages over a 4x4 grid of the image: pixels keep the layout, pooled features do",
        "not.",
        "",
        *_format_rows(["features", *(f"k-NN, k = {k}" for k in ks), "linear probe", "attentive probe"], rows),
        "",
        f"The most frequent class alone gives {100 * report.data['most_frequent_class']:.1f}.",
    ]


def _format_protocols(report: Report) -> list[str]:
    if not report.protocols:
        return []
    names = list(dict.fromkeys(name for scores in report.protocols.values() for name in scores))
    rows = [
        [protocol, *(f"{100 * scores[name]:.1f}" if name in scores else "-" for name in names)]
        for protocol, scores in report.protocols.items()
    ]
    return [
        "## Protocols of papers (%)",
        "",
        "I-JEPA (arXiv 2301.08243): averages over patches of the last layer, or of the last four concatenated; fitted",
        "by L-BFGS without augmentation. DINO (arXiv 2104.14294): features are not standardised, temperature 0.07.",
        "",
        *_format_rows(["protocol", *names], rows),
    ]


def _format_low_shot(report: Report) -> list[str]:
    if not report.low_shot:
        return []
    names = list(dict.fromkeys(name for scores in report.low_shot.values() for name in scores))
    rows = []
    for labels, scores in report.low_shot.items():
        cells = [f"{100 * scores[name]['mean']:.1f} ± {100 * scores[name]['std']:.1f}" for name in names]
        rows.append([f"{labels} ({next(iter(scores.values()))['num_images']} images)", *cells])
    header = ["labelled training images", *names]
    return ["## Low-shot linear probe (%): mean ± deviation of three draws", "", *_format_rows(header, rows)]


def _format_segmentation(report: Report) -> list[str]:
    if not report.segmentation:
        return []
    rows = [
        [
            name,
            f"{100 * scores['mean_iou']:.1f} ± {100 * scores['mean_iou_error']:.1f}",
            f"{100 * scores['object_iou']:.1f}",
        ]
        for name, scores in report.segmentation.items()
    ]
    header = ["features", "mean IoU over classes", "IoU of object against background"]
    return ["## Segmentation by a linear probe of patches (%)", "", *_format_rows(header, rows)]


def _format_collapse(report: Report) -> list[str]:
    if not report.collapse:
        return []
    rows = [
        [
            name,
            f"{numbers['effective_rank']:.1f} of {numbers['num_dimensions']}",
            f"{numbers['effective_rank_centered']:.1f}",
            f"{numbers['feature_std']:.4f}",
            f"{numbers['feature_std_min']:.4f}",
            f"{numbers['mean_cosine']:.3f}",
        ]
        for name, numbers in report.collapse.items()
    ]
    header = ["features", "effective rank", "centred", "std per dimension, mean", "smallest", "mean cosine"]
    return ["## Collapse", "", *_format_rows(header, rows)]


def _best_accuracy(accuracy: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    return {name: max(values.values()) for name, values in accuracy.items()}


def _error(accuracy: float, report: Report) -> str:
    """Standard error of an accuracy over the validation images, in percent."""
    return f"{100 * math.sqrt(accuracy * (1 - accuracy) / report.data['validation_images']):.1f}"


def _gain(best: Mapping[str, float], baseline: str) -> str:
    return f"{100 * (best['trained'] - best[baseline]):+.1f}"


def _format_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
