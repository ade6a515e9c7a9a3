"""`dmtjepa compare RUN RUN ...`: several runs side by side, in the terminal and as a page."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command
from dmtjepa.errors import UserError


def main(arguments: Sequence[str] | None = None, *, prog: str = "dmtjepa compare") -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            "Print in what runs differ and what they reach; with --html, write a page with curves.",
            "dmtjepa compare runs/a runs/b",
            "dmtjepa compare runs/* --html compare.html",
        ),
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, at least two")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, such as compare.html")
    options = parser.parse_args(arguments)
    if len(options.runs) < 2:
        parser.error("name at least two runs")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    return run_command(lambda: show(options.runs, options.html), errors=(UserError, OSError))


def show(runs: Sequence[Path], page: Path | None) -> int:
    """Print the comparison, and write the page if one is named; returns the exit status."""
    from dmtjepa.evaluation.comparison import compare
    from dmtjepa.evaluation.formatting import align_columns
    from dmtjepa.files import write_atomically

    comparison = compare(runs)
    labels = [run.label for run in comparison.runs]
    # One table, so that the columns of both parts stand below each other.
    settings = comparison.settings or [["the settings are the same", *[""] * len(labels)]]
    print(align_columns([["", *labels], *settings, [""] * (1 + len(labels)), *comparison.results]))
    print("\n".join(["", *comparison.findings]) if comparison.findings else "")
    if page is not None:
        from dmtjepa.evaluation.page.compare_page import make_compare_page

        write_atomically(page, make_compare_page(comparison))
        print(f"\nwritten: {page}")
    return 0
