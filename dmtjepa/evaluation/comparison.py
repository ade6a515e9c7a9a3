"""Several runs side by side: in what their settings differ, how far they are, and what they reach."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmtjepa.config import Config, Resume, different_settings, resume_rules
from dmtjepa.errors import UserError
from dmtjepa.evaluation.page.charts import QUANTITIES, Line, format_value, read_lines
from dmtjepa.evaluation.page.scores import Score, Value, list_scores
from dmtjepa.run_folder import RunFolder, open_run

BLANK = "-"
IGNORED = ("logging.folder", "logging.write_tag")
"""Settings that differ between any two runs and say nothing."""
SHOWN = ("train/loss", "targets/explained_variance", "features/effective_rank", "train/images_per_second")
MEASURES = ("Linear probe", "k-NN, best k", "Mean IoU")
"""What tells the best run: the first of them that at least two runs have."""


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run.

    label: its name, which no other run of the comparison has.
    epochs: that are done; None if nothing was logged.
    scores: of its report, empty without one. images: what the report was measured on.
    measured_epoch: of the weights that were measured.
    missing: what could not be read, and what to do.
    """

    label: str
    config: Config
    lines: dict[str, Line]
    epochs: float | None
    scores: list[Score] = field(default_factory=list)
    images: tuple[Any, ...] | None = None
    measured_epoch: float | None = None
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Runs, and tables with a row for each setting or result, and a column for each run after its name."""

    runs: list[RunSummary]
    settings: list[list[str]]
    results: list[list[str]]
    findings: list[str]


def compare(paths: Sequence[Path]) -> Comparison:
    """Read runs and compare them. What a run does not have is `BLANK`.

    Raises:
        RunFolderError: a folder is not a run. ConfigError: its settings cannot be read.
    """
    runs = [
        summarize(path, label, color) for color, (path, label) in enumerate(zip(paths, name_runs(paths), strict=True))
    ]
    return Comparison(runs, tabulate_settings(runs), tabulate_results(runs), [*judge(runs), *list_missing(runs)])


def name_runs(paths: Sequence[Path]) -> list[str]:
    """The names of the folders; the whole paths of those that share a name, numbered if they are the same."""
    names = [path.resolve().name for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def summarize(path: Path, label: str, color: int) -> RunSummary:
    """Read what a run folder holds."""
    run, config = open_run(path)
    rows, missing, losses = run.read_metrics(), [], None
    try:
        losses = run.read_losses()
    except UserError as error:
        missing.append(str(error))
    lines = read_lines(rows, losses, label, color)
    if not lines:
        missing.append("nothing was logged yet")
    epochs = next((float(row["epoch"]) for row in reversed(rows) if isinstance(row.get("epoch"), (int, float))), None)
    if epochs is None and losses is not None and len(losses.epoch):
        epochs = math.ceil(losses.epoch[-1])
    summary = RunSummary(label, config, lines, epochs, missing=missing)
    return add_report(summary, run, path)


def add_report(summary: RunSummary, run: RunFolder, path: Path) -> RunSummary:
    """Add what the report of a run says."""
    if not run.report_file.is_file():
        summary.missing.append(f"it has no report: dmtjepa evaluate {path}")
        return summary
    try:
        report = json.loads(run.report_file.read_text())
        data, epoch = report["data"], report["run"].get("epoch")
        images = (data["description"], data["train_images"], data["validation_images"])
        scores = list_scores(report)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        summary.missing.append(f"{run.report_file} cannot be read: make it again by dmtjepa evaluate {path}")
        return summary
    return RunSummary(
        summary.label, summary.config, summary.lines, summary.epochs, scores, images, epoch, summary.missing
    )


def tabulate_settings(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The settings that are not the same in all runs: their name, and their value in each run.

    Those that do not change what is trained come last.
    """
    keys = {key for run in runs[1:] for key, _, _ in different_settings(runs[0].config, run.config)} - set(IGNORED)
    values = [run.config.model_dump(mode="json") for run in runs]
    rules = resume_rules(Config)
    ordered = sorted(keys, key=lambda key: (rules[key] is Resume.FREE, key))
    return [[key, *(_show(value, key) for value in values)] for key in ordered]


def tabulate_results(runs: Sequence[RunSummary]) -> list[list[str]]:
    """What the runs have reached: its name, and its value for each run."""
    rows = [
        ["steps", *(_count_steps(run) for run in runs)],
        ["epochs", *(BLANK if run.epochs is None else f"{run.epochs:.4g} of {_num_epochs(run)}" for run in runs)],
    ]
    for quantity in QUANTITIES:
        if quantity.name in SHOWN:
            lines = [run.lines.get(quantity.name) for run in runs]
            cells = [BLANK if line is None else format_value(line.values, quantity.unit) for line in lines]
            rows.append([quantity.title[0].lower() + quantity.title[1:], *cells])
    measures = dict.fromkeys(score.measure for run in runs for score in run.scores)
    if measures:
        epochs = [BLANK if run.measured_epoch is None else f"{run.measured_epoch:g}" for run in runs]
        rows.append(["measured after epoch", *epochs])
    for measure in measures:
        values = [_find_value(run, measure) for run in runs]
        rows.append([f"{measure} (%)", *(BLANK if value is None else str(value) for value in values)])
    return rows


def judge(runs: Sequence[RunSummary]) -> list[str]:
    """Which run is the best, and how sure that is."""
    images = {run.images for run in runs if run.images is not None}
    if len(images) > 1:
        return ["The reports were measured on different images: their accuracies cannot be compared"]
    for measure in MEASURES:
        found = [(run.label, value) for run in runs if (value := _find_value(run, measure)) is not None]
        if len(found) < 2:
            continue
        best, top = max(found, key=lambda pair: pair[1].mean)
        behind: list[str] = []
        close: list[str] = []
        for label, value in found:
            if label != best:
                error = math.hypot(top.error, value.error)
                (behind if top.mean - value.mean > 2 * error else close).append(label)
        parts = [f"{measure}: {best} is the best with {top}"]
        parts += [f"clearly better than {', '.join(behind)}"] * bool(behind)
        parts += [f"not clearly better than {', '.join(close)}"] * bool(close)
        return ["; ".join(parts) + " (two standard errors over the images; other seeds can differ more)"]
    return []


def list_missing(runs: Sequence[RunSummary]) -> list[str]:
    """What could not be read, of each run."""
    return [f"{run.label}: {reason}" for run in runs for reason in run.missing]


def _find_value(run: RunSummary, measure: str) -> Value | None:
    return next((score.values.get("trained") for score in run.scores if score.measure == measure), None)


def _count_steps(run: RunSummary) -> str:
    steps = [int(np.max(line.steps)) for line in run.lines.values()]
    return f"{max(steps)}" if steps else BLANK


def _num_epochs(run: RunSummary) -> str:
    return f"{run.config.optimization.epochs:g}"


def _show(values: dict[str, Any], key: str) -> str:
    value: Any = values
    for name in key.split("."):
        value = value[name]
    return value if isinstance(value, str) and value else json.dumps(value)
