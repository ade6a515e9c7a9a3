"""compare.html: several runs side by side, their curves over each other."""

from __future__ import annotations

from dmtjepa.evaluation.comparison import Comparison
from dmtjepa.evaluation.page.charts import make_charts
from dmtjepa.evaluation.page.rendering import render


def make_compare_page(comparison: Comparison) -> str:
    """The page of a comparison, in HTML."""
    return render(
        "compare.html.j2",
        labels=[run.label for run in comparison.runs],
        settings=comparison.settings,
        results=comparison.results,
        findings=comparison.findings,
        charts=make_charts([run.lines for run in comparison.runs]),
    )
