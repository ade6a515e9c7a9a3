"""Tables that programs print, and the files of results and plots that they write."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.machine import environment


def text_table(columns: dict[str, Callable[[dict], str]], rows: Sequence[dict], num_names: int) -> str:
    """One line per row; the first `num_names` columns are names, aligned left."""
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def join(line: list[str]) -> str:
        names = (cell.ljust(width) for cell, width in zip(line[:num_names], widths, strict=False))
        numbers = (cell.rjust(width) for cell, width in zip(line[num_names:], widths[num_names:], strict=True))
        return "  ".join([*names, *numbers]).rstrip()

    return "\n".join(map(join, lines))


def number(key: str, text: str = "{:.1f}", scale: float = 1.0) -> Callable[[dict], str]:
    """A column of a table: `row[key] * scale`, or a dash where the row has no such value."""
    return lambda row: "-" if row.get(key) is None else text.format(row[key] * scale)


def save(out: Path | None, name: str, device: str, rows: list[dict], *, plot: Callable | None = None, **more) -> None:
    """Write `<hardware>-<date>-<name>.json` into the folder `out`, and what `plot(axes, rows)` draws as .png beside it.

    Does nothing without a folder.
    """
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
    path = out / f"{hardware}-{date.today()}-{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**environment(device), **more, "rows": rows}, indent=1) + "\n")
    unfinished.replace(path)  # a program that is stopped leaves whole files
    if plot is None:
        return
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1 + 0.35 * min(25, max(8, len(rows)))), layout="constrained")
        plot(figure.add_subplot(), rows)
        figure.savefig(path.with_suffix(".png"), dpi=120)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")
    except Exception:  # the results are written: a benchmark must not fail because of its plot
        traceback.print_exc()


def add_time_anyway(parser: argparse.ArgumentParser) -> None:
    """Add `--time-anyway`."""
    help_text = (
        "time what differs from the reference, too. Its rows say `correct: false` and meet no goal, and the program "
        "still exits with 1. For a GPU that is borrowed for minutes"
    )
    parser.add_argument("--time-anyway", action="store_true", help=help_text)
