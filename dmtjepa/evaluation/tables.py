"""The tables of a report, for every format that it is written in, and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dmtjepa.evaluation.formatting import WITH_LAYOUT, Report, format_verdict
from dmtjepa.evaluation.gains import accuracy_error


@dataclass(frozen=True)
class Table:
    """A table with its title.

    text: what the numbers are. note: what follows the table. Both can be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    note: str = ""


def list_tables(report: Report) -> list[Table]:
    """All tables of a report; what was not measured has none."""
    tables = (
        _tabulate_accuracy(report),
        _tabulate_protocols(report),
        _tabulate_low_shot(report),
        _tabulate_segmentation(report),
        _tabulate_collapse(report),
    )
    return [table for table in tables if table is not None]


def describe_model(report: Report) -> str:
    """The network and the checkpoint, in a sentence without its end."""
    run = report.run
    size = "x".join(map(str, run["image_size"]))
    return (
        f"{run['model']}, patches of {run['patch_size']} in images of {size} pixels, {run['parameters'] / 1e6:.1f} M "
        "parameters"
    )


def describe_images(report: Report) -> str:
    """The images that were measured on."""
    data = report.data
    classes = f" of {data['classes']} classes" if data["classes"] else ""
    return (
        f"{data['description']}: {data['train_images']} training images and {data['validation_images']} validation "
        f"images{classes}"
    )


def format_markdown(report: Report, figures: Sequence[str]) -> str:
    """The report as Markdown; `figures` are the names of PNG files in the same folder, the composite first."""
    run, loss = report.run, report.loss
    epoch = f" after epoch {run['epoch']}" if run["epoch"] is not None else ""
    lines = [
        f"# Report of {run['folder'] or run['name']}",
        "",
        f"{describe_model(report)}; teacher of `{run['checkpoint']}`{epoch}; seed {run['seed']}, torch {run['torch']}.",
        "",
        f"Data: {describe_images(report)}.",
        "",
        *(f"- {line}" for line in format_verdict(report)),
    ]
    if loss:
        lines.append(f"- loss {loss['first']:.4f} -> {loss['last']:.4f} over {loss['steps']} logged steps")
    for table in list_tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += [table.text, ""] * bool(table.text)
        lines += [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        lines += ["", table.note] * bool(table.note)
    if figures:
        lines += ["", "## Figures", "", f"![all figures, which are also files of their own]({figures[0]})"]
    return "\n".join(lines) + "\n"


def _tabulate_accuracy(report: Report) -> Table | None:
    if not report.knn and not report.linear:
        return None
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
        rows.append([name + WITH_LAYOUT, *(f"{100 * values[k]:.1f}" for k in ks), "-", "-"])
    return Table(
        "Accuracy (%)",
        ["features", *(f"k-NN, k = {k}" for k in ks), "linear probe", "attentive probe"],
        rows,
        "Frozen, average-pooled features. `trained` is the teacher, `start` are weights that the run started from, and "
        "`untrained` is the same network with drawn weights; `pixels` is the image itself, averaged to at most 32x32. "
        "Votes are weighted with temperature 0.07 (in brackets: unweighted). ± is the standard error over the "
        "validation images. `with layout` concatenates averages over a 4x4 grid of the image: pixels keep the layout, "
        "pooled features do not.",
        f"The most frequent class alone gives {100 * report.data['most_frequent_class']:.1f}.",
    )


def _tabulate_protocols(report: Report) -> Table | None:
    if not report.protocols:
        return None
    names = list(dict.fromkeys(name for scores in report.protocols.values() for name in scores))
    rows = [
        [protocol, *(f"{100 * scores[name]:.1f}" if name in scores else "-" for name in names)]
        for protocol, scores in report.protocols.items()
    ]
    return Table(
        "Protocols of papers (%)",
        ["protocol", *names],
        rows,
        "I-JEPA (arXiv 2301.08243): averages over patches of the last layer, or of the last four concatenated; fitted "
        "by L-BFGS without augmentation. DINO (arXiv 2104.14294): features are not standardised, temperature 0.07.",
    )


def _tabulate_low_shot(report: Report) -> Table | None:
    if not report.low_shot:
        return None
    names = list(dict.fromkeys(name for scores in report.low_shot.values() for name in scores))
    rows = []
    for labels, scores in report.low_shot.items():
        cells = [f"{100 * scores[name]['mean']:.1f} ± {100 * scores[name]['std']:.1f}" for name in names]
        rows.append([f"{labels} ({next(iter(scores.values()))['num_images']} images)", *cells])
    header = ["labelled training images", *names]
    return Table("Low-shot linear probe (%): mean ± deviation of three draws", header, rows)


def _tabulate_segmentation(report: Report) -> Table | None:
    if not report.segmentation:
        return None
    rows = [
        [
            name,
            f"{100 * scores['mean_iou']:.1f} ± {100 * scores['mean_iou_error']:.1f}",
            f"{100 * scores['object_iou']:.1f}",
        ]
        for name, scores in report.segmentation.items()
    ]
    header = ["features", "mean IoU over classes", "IoU of object against background"]
    return Table("Segmentation by a linear probe of patches (%)", header, rows)


def _tabulate_collapse(report: Report) -> Table | None:
    if not report.collapse:
        return None
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
    return Table("Collapse", header, rows)


def _error(accuracy: float, report: Report) -> str:
    """Standard error of an accuracy over the validation images, in percent."""
    return f"{100 * accuracy_error(accuracy, report.data['validation_images']):.1f}"
