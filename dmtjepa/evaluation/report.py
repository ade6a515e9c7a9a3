"""The report of a run, written as report.html, report.md, report.json and PNG files.

It compares teacher and student with the untrained network and with raw pixels: k-NN, linear, attentive and low-shot
accuracy, collapse numbers, segmentation if there are masks, and figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmtjepa.data.sources.base import make_printable
from dmtjepa.evaluation import measurements
from dmtjepa.evaluation.context import EvaluationContext, load_encoders, load_start
from dmtjepa.evaluation.errors import EvaluationError, NotMeasuredError
from dmtjepa.evaluation.figure_data import NUM_SHOWN, add_nearest, collect_figure_data
from dmtjepa.evaluation.figures import FigureData, save_figures
from dmtjepa.evaluation.formatting import WITH_LAYOUT, Report
from dmtjepa.evaluation.option_names import KEYWORDS, OptionNames
from dmtjepa.evaluation.page.report_page import make_report_page
from dmtjepa.evaluation.retrieval import FeaturedImages
from dmtjepa.evaluation.splits import Splits
from dmtjepa.evaluation.subject import Subject
from dmtjepa.evaluation.tables import format_markdown
from dmtjepa.evaluation.verdict import describe
from dmtjepa.files import check_writable, write_atomically, write_json
from dmtjepa.interop import read_checkpoint
from dmtjepa.run_folder import PAGE, RunFolder
from dmtjepa.step_csv import LossCurve

MAX_NAMED = 5
"""Images that cannot be read, in a note of the report."""


def evaluate(
    subject: Subject,
    splits: Splits,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: bool = True,
    quick: bool = False,
    options: OptionNames = KEYWORDS,
) -> Report:
    """Measure the teacher and the student of a run, and the weights it started from; write the report into its folder.

    Weights by themselves have no curves, no start and no verdict on their training.

    Args:
        quick: leave out low-shot and attentive probes, and the probe of the last four layers.
        options: what messages call the options.

    Raises:
        WeightsError: the checkpoint has no teacher, or the teacher does not fit the settings or is not finite.
        EvaluationError: a split has no readable image, features are not finite, or the folder of the report cannot be
            written to.
    """
    check_options(subject.out, num_workers, options)
    config, run = subject.config, subject.run
    encoders = load_encoders(config, subject.checkpoint, device)
    context = EvaluationContext(config, encoders, splits, device, num_workers, progress, quick, options)
    report = Report(describe_subject(subject, context), describe_data(splits), notes=list(splits.notes))
    if run is not None:
        with skipping(report):
            start = load_start(config, run, encoders["untrained"])
            encoders |= {} if start is None else {"start": start}

    gallery = measure_features(report, context)
    segmented = None
    with skipping(report):
        scores, segmented = measurements.measure_segmentation(context, num_shown=NUM_SHOWN)
        report.segmentation = {name: asdict(numbers) for name, numbers in scores.items()}
    loss = None
    if run is not None:
        with skipping(report):
            loss = read_loss_curve(run)
            report.loss = measurements.summarize_loss(loss)
        report.verdict = describe(run.read_metrics(), config.patch)

    chance = report.data.get("most_frequent_class")
    accuracy = report.knn | {name + WITH_LAYOUT: values for name, values in report.knn_layout.items()}
    figures = collect_figure_data(context, loss=loss, accuracy=accuracy, chance=chance, segmented=segmented)
    with skipping(report):
        figures = add_nearest(figures, context, gallery)
    if context.corrupt:
        names = ", ".join(map(make_printable, sorted(context.corrupt)[:MAX_NAMED]))
        more = f" and {len(context.corrupt) - MAX_NAMED} more" if len(context.corrupt) > MAX_NAMED else ""
        report.notes.append(f"left out because they cannot be read: {names}{more}")
    write_report(report, figures, subject)
    return report


def check_options(out: Path, num_workers: int, options: OptionNames) -> None:
    """Refuse what would fail after minutes. Raises EvaluationError."""
    if num_workers < 0:
        raise EvaluationError(f"{options.num_workers} must be at least 0, not {num_workers}")
    try:
        check_writable(out)
    except OSError as error:
        raise EvaluationError(f"{out} ({options.out}) cannot be written to: {error}") from error


def describe_subject(subject: Subject, context: EvaluationContext) -> dict[str, Any]:
    """What was measured: the run, its checkpoint and its model. `folder` is None for weights by themselves."""
    config, epoch = subject.config, read_checkpoint(subject.checkpoint).get("epoch")
    return {
        "name": subject.name,
        "folder": None if subject.run is None else str(subject.run.path),
        "checkpoint": str(subject.checkpoint),
        "model": config.meta.model_name,
        "patch_size": config.mask.patch_size,
        "image_size": list(config.data.image_size),
        "parameters": sum(p.numel() for p in context.encoders["trained"].parameters()),
        "epoch": epoch if isinstance(epoch, (int, float)) else None,
        "seed": config.runtime.seed,
        "start": config.meta.read_checkpoint if config.meta.load_checkpoint else None,
        "torch": torch.__version__,
    }


def describe_data(splits: Splits) -> dict[str, Any]:
    """The images that were measured on."""
    return {
        "description": splits.description,
        "train_images": len(splits.train),
        "validation_images": len(splits.validation),
        "classes": len(splits.train.class_names) if splits.unlabelled is None else None,
        "most_frequent_class": None,  # known once the labels have been read
    }


def measure_features(report: Report, context: EvaluationContext) -> FeaturedImages:
    """Fill in what is measured on pooled features: collapse numbers, k-NN and linear probes.

    Returns the images among which nearest ones can be sought: those for training, without labels those for validation.
    """
    splits, device = context.splits, context.device
    num_bytes = measurements.layout_bytes(context)
    layout = splits.unlabelled is None and num_bytes <= measurements.LAYOUT_BYTES
    validation = measurements.extract_split(context, splits.validation, "validation", layout=layout)
    collapse = measurements.measure_collapse(validation)
    report.collapse = {name: asdict(numbers) for name, numbers in collapse.items()}
    report.collapsed = "trained" in collapse and collapse["trained"].collapsed
    if splits.unlabelled is not None:
        report.skipped.append(f"k-NN and linear probe: {splits.description}: {splits.unlabelled}")
        return FeaturedImages(splits.validation, validation["trained"].pooled)

    train = measurements.extract_split(context, splits.train, "training", layout=layout)
    train["pixels"] = measurements.extract_split_pixels(context, splits.train)
    validation["pixels"] = measurements.extract_split_pixels(context, splits.validation)
    num_train = len(train["trained"].pooled)
    neighbors = tuple(k for k in context.config.evaluation.neighbors if k <= num_train)
    if neighbors != context.config.evaluation.neighbors:
        report.skipped.append(f"k-NN with k above the {num_train} training images")
    if neighbors:
        report.knn = measurements.measure_knn(train, validation, neighbors, device=device)
        report.knn_plain = measurements.measure_knn(train, validation, neighbors, weighted=False, device=device)
        report.knn_layout = measurements.measure_knn_layout(train, validation, neighbors, device=device)
    if not layout:
        report.skipped.append(
            f"k-NN with layout: its features would take {num_bytes / 2**30:.0f} GiB; the limit is "
            f"{measurements.LAYOUT_BYTES / 2**30:.0f} GiB. Use {context.options.max_images}"
        )
    with skipping(report):
        report.linear = measurements.measure_linear(train, validation, device=device)
    measure_papers(report, context, train, validation)
    labels = validation["trained"].labels
    assert labels is not None
    report.data["train_images"] = num_train  # without those that cannot be read
    report.data["validation_images"] = len(labels)
    report.data["most_frequent_class"] = (labels.bincount().max() / len(labels)).item()
    return FeaturedImages(splits.train, train["trained"].pooled)


def measure_papers(
    report: Report,
    context: EvaluationContext,
    train: measurements.FeatureSets,
    validation: measurements.FeatureSets,
) -> None:
    """Fill in what papers measure: their linear probes and k-NN, and, unless `quick`, low-shot and attentive probes."""
    encoded = {name: features for name, features in validation.items() if name != "pixels"}
    report.protocols = measurements.measure_protocols(train, encoded, report.linear, device=context.device)
    if context.quick:
        report.skipped.append(f"low-shot and attentive probes, and the last four layers ({context.options.quick})")
        return
    report.low_shot = measurements.measure_few_labels(train, validation, device=context.device)
    with skipping(report):
        report.attentive = measurements.measure_attentive(context)


def read_loss_curve(run: RunFolder) -> LossCurve:
    """The losses of a run.

    Raises:
        NotMeasuredError: the run has no CSV.
    """
    curve = run.read_losses()
    if curve is None:
        raise NotMeasuredError(f"loss curve: the run has no {run.csv_file(0).name}")
    return curve


def write_report(report: Report, figures: FigureData, subject: Subject) -> None:
    """Write report.html, report.md, report.json and the figures into their folder; list them in `report.files`."""
    out, config = subject.out, subject.config
    out.mkdir(parents=True, exist_ok=True)
    title = f"{subject.name}: {config.meta.model_name}, patch {config.mask.patch_size}"
    paths = save_figures(figures, out, title)
    report.files = [str(out / name) for name in (PAGE, "report.md", "report.json")] + list(map(str, paths))
    write_json(out / "report.json", asdict(report))
    write_atomically(out / "report.md", format_markdown(report, [path.name for path in paths]))
    write_atomically(out / PAGE, make_report_page(report, figures, subject.run, config))


@contextlib.contextmanager
def skipping(report: Report) -> Iterator[None]:
    """Record a measurement that raises NotMeasuredError as skipped, and continue after the block."""
    try:
        yield
    except NotMeasuredError as reason:
        report.skipped.append(str(reason))
