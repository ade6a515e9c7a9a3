"""report.html: everything that is known of a run, verdict first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dmtjepa.config import Config, different_settings, parse_config
from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.formatting import Report, format_results
from dmtjepa.evaluation.page.charts import make_charts, read_lines
from dmtjepa.evaluation.page.pictures import make_galleries
from dmtjepa.evaluation.page.rendering import render
from dmtjepa.evaluation.page.scores import FEATURES, find_headline, list_scores
from dmtjepa.evaluation.tables import describe_images, describe_model, list_tables
from dmtjepa.run_folder import RunFolder


def make_report_page(report: Report, figures: FigureData, run: RunFolder | None, config: Config) -> str:
    """The page of a run, or of weights by themselves, in HTML.

    Args:
        report, figures: what was measured.
        run: its folder, for the curves and the environment of its starts. None for weights by themselves.
        config: the settings of the run, or those that the weights are measured with.
    """
    values = asdict(report)
    scores = list_scores(values)
    starts, rows = ([], []) if run is None else (run.read_starts(), run.read_metrics())
    different = different_settings(parse_config({}), config)
    return render(
        "report.html.j2",
        title=report.run["name"],
        report=report,
        headline=find_headline(values, scores),
        results=format_results(report),
        scores=scores,
        names=[name for name in FEATURES if any(name in score.values for score in scores)],
        charts=make_charts([read_lines(rows, figures.loss)]),
        galleries=make_galleries(figures),
        tables=list_tables(report),
        model=describe_model(report),
        images=describe_images(report),
        changed=[(key, show(value), show(default)) for key, default, value in different],
        settings=config.to_yaml(),
        environment=list(flatten(starts[-1]).items()) if starts else [],
        num_starts=len(starts),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by a name with dots, as text; those that are None or empty are left out."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            found[f"{prefix}{name}"] = show(value)
    return found


def show(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    return value if isinstance(value, str) and value else json.dumps(value)
