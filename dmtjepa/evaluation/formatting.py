"""What a report holds, and how it reads: the table and sentences that are printed, and report.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What was measured. Accuracies are shares from 0 to 1; keys of `knn` are k; parts not measured are empty.

    knn, knn_plain, linear, collapse, segmentation: by the features' name, `trained`, `untrained` or `pixels`.
    knn_layout: of `trained` and `untrained`, features that keep the layout of the image, as pixels do.
    skipped: what was not measured, and why.
    """

    run: dict[str, Any]
    data: dict[str, Any]
    knn: dict[str, dict[int, float]] = field(default_factory=dict)
    knn_plain: dict[str, dict[int, float]] = field(default_factory=dict)
    knn_layout: dict[str, dict[int, float]] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)
    collapse: dict[str, dict[str, float]] = field(default_factory=dict)
    segmentation: dict[str, dict[str, float]] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False
    skipped: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def format_table(report: Report) -> str:
    """The accuracies as plain text: one line for each kind of features, one column for each k and probe."""
    ks = list(next(iter(report.knn.values()), {}))
    header = ["features", *(f"k-NN k={k}" for k in ks)]
    header += ["linear"] * bool(report.linear) + ["mIoU"] * bool(report.segmentation)
    lines = [header]
    for name in ("trained", "untrained", "pixels"):
        scores = [report.knn[name][k] if name in report.knn else None for k in ks]
        scores += [report.linear.get(name)] * bool(report.linear)
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
    """One sentence for each thing to know: gain over the baselines, collapse, what was skipped."""
    lines = []
    if report.knn:
        # Each kind of features at its own best k: a k chosen for the trained alone would flatter it.
        best = {name: max(values.values()) for name, values in report.knn.items()}
        error = math.sqrt(best["trained"] * (1 - best["trained"]) / report.data["validation_images"])
        gains = ", ".join(
            f"{100 * (best['trained'] - best[name]):+.1f} points against {name}" for name in ("untrained", "pixels")
        )
        lines.append(f"k-NN: {100 * best['trained']:.1f}% +- {100 * error:.1f} (standard error) at the best k; {gains}")
    if report.knn_layout:
        best = {name: max(values.values()) for name, values in (report.knn | report.knn_layout).items()}
        lines.append(
            f"with layout: {100 * best['trained']:.1f}%; {100 * (best['trained'] - best['untrained']):+.1f} points "
            f"against untrained, {100 * (best['trained'] - best['pixels']):+.1f} against pixels"
        )
    if "trained" in report.collapse:
        numbers = report.collapse["trained"]
        state = "COLLAPSED: features are all but the same" if report.collapsed else "no sign of collapse"
        lines.append(
            f"{state}: effective rank {numbers['effective_rank']:.1f} of {numbers['num_dimensions']}, "
            f"mean cosine {numbers['mean_cosine']:.2f}"
        )
    return lines + [f"skipped {reason}" for reason in report.skipped]


def format_markdown(report: Report, figures: Sequence[str]) -> str:
    """The report as Markdown; `figures` are file names beside it, the composite first."""
    run, data = report.run, report.data
    size = "x".join(map(str, run["image_size"]))
    lines = [
        f"# Report of {run['folder']}",
        "",
        f"{run['model']}, patches of {run['patch_size']} in images of {size} pixels, {run['parameters'] / 1e6:.1f} M "
        f"parameters; teacher of `{run['checkpoint']}`"
        + (f" after epoch {run['epoch']}" if run["epoch"] is not None else "")
        + f"; seed {run['seed']}, torch {run['torch']}.",
        "",
        f"Data: {data['description']}: {data['train_images']} training images and {data['validation_images']} "
        "validation images" + (f" of {data['classes']} classes." if data["classes"] else "."),
        "",
        *(f"- {line}" for line in format_verdict(report)),
    ]
    if report.loss:
        lines.append(
            f"- loss {report.loss['first']:.4f} -> {report.loss['last']:.4f} over {report.loss['steps']} logged steps"
        )
    if report.knn:
        ks = list(report.knn["trained"])
        lines += [
            "",
            "## Accuracy (%)",
            "",
            "Frozen, average-pooled features; `untrained` is the same network with the run's seed,",
        ]
        lines += [
            "`pixels` the image itself, averaged to at most 32x32. Votes are weighted with temperature 0.07 (in",
            "brackets: plain votes). `with layout`: averages over 4x4 fields of the image, concatenated; pixels have",
            "theirs too, which pooled features give up.",
            "",
        ]
        lines += _table(
            ["features", *(f"k-NN, k = {k}" for k in ks), "linear probe"],
            [
                [
                    name,
                    *(f"{100 * report.knn[name][k]:.1f} ({100 * report.knn_plain[name][k]:.1f})" for k in ks),
                    f"{100 * report.linear[name]:.1f}" if name in report.linear else "-",
                ]
                for name in report.knn
            ]
            + [
                [f"{name}, with layout", *(f"{100 * values[k]:.1f}" for k in ks), "-"]
                for name, values in report.knn_layout.items()
            ],
        )
        lines += ["", f"Always answering the most frequent class gives {100 * data['most_frequent_class']:.1f}."]
    if report.segmentation:
        lines += ["", "## Segmentation by a linear probe of patches (%)", ""]
        lines += _table(
            ["features", "mean IoU over classes", "IoU of object against ground"],
            [
                [name, f"{100 * s['mean_iou']:.1f}", f"{100 * s['object_iou']:.1f}"]
                for name, s in report.segmentation.items()
            ],
        )
    if report.collapse:
        lines += ["", "## Collapse", ""]
        lines += _table(
            ["features", "effective rank", "centred", "std per dimension, mean", "smallest", "mean cosine"],
            [
                [
                    name,
                    f"{c['effective_rank']:.1f} of {c['num_dimensions']}",
                    f"{c['effective_rank_centered']:.1f}",
                    f"{c['feature_std']:.4f}",
                    f"{c['feature_std_min']:.4f}",
                    f"{c['mean_cosine']:.3f}",
                ]
                for name, c in report.collapse.items()
            ],
        )
    if figures:
        lines += ["", "## Figures", "", f"![loss, accuracy, masks, neighbours, principal components]({figures[0]})"]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
