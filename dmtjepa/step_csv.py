"""The CSV of a rank, `{tag}_r{rank}.csv`: one row per step, with the columns of the official code."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtjepa.errors import UserError
from dmtjepa.files import open_atomically
from dmtjepa.log_file import LogFile

COLUMNS = ("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)")


class CsvError(UserError, ValueError):
    """A file that is not the CSV of a rank; the message names it."""


@dataclass(frozen=True)
class LossCurve:
    """Losses of a run: epoch as a real number (1.5 is half way through the second epoch) and loss, both [n]."""

    epoch: np.ndarray
    loss: np.ndarray


class StepCsv:
    """Writes the rows of a rank, after those that an earlier start of the run has left.

    Args:
        path: the file. Its rows of `first_step` and later, which a killed run has written, are removed.
        first_step: number of steps that are done.
        steps_per_epoch: to find the place of `first_step`.
    """

    def __init__(self, path: Path, *, first_step: int, steps_per_epoch: int) -> None:
        rows = _read_rows_before(path, first_step, steps_per_epoch)
        with open_atomically(path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        self._file = LogFile(path)

    def write(
        self, epoch: int, step_in_epoch: int, loss: float, context_size: float, target_size: float, seconds: float
    ) -> None:
        """Add the row of a step. `epoch` and `step_in_epoch` count from 0; in the file epochs count from 1."""
        # 9 digits tell any two float32 apart.
        row = (epoch + 1, step_in_epoch, f"{loss:.9g}", f"{context_size:.5f}", f"{target_size:.5f}")
        self._file.write(",".join(map(str, (*row, round(1000 * seconds)))).encode() + b"\n")

    def flush(self) -> None:
        """Write the rows to the file. Those that cannot be written stay in memory until they can."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def has_rows(path: Path) -> bool:
    """Whether a CSV holds anything besides a header."""
    with path.open(newline="", errors="replace") as file:
        return any(line.strip() for line in file if line.strip() != ",".join(COLUMNS))


def read_losses(path: Path) -> LossCurve:
    """Read the losses from the CSV of a rank.

    Raises:
        CsvError: the file cannot be read, or a column is missing.
    """
    try:
        with path.open(newline="", errors="replace") as file:
            reader = csv.DictReader(_without_nul(file))
            missing = set(COLUMNS[:3]) - set(reader.fieldnames or ())
            if missing:
                raise CsvError(f"{path} has no column {', '.join(sorted(missing))}; its header is {reader.fieldnames}")
            rows = [[_to_number(row[name]) for name in COLUMNS[:3]] for row in reader]
    except (OSError, csv.Error) as error:
        raise CsvError(f"{path} cannot be read: {error}") from error
    # A killed run can leave a truncated last line, a resumed run a second header.
    numbers = np.array([row for row in rows if None not in row], dtype=float).reshape(-1, 3)
    epoch, step, loss = numbers.T
    steps_per_epoch = step.max() + 1 if len(step) else 1
    first = epoch.min() if len(epoch) else 0
    return LossCurve(epoch - first + step / steps_per_epoch, loss)


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    """Replace NUL characters, which a power failure can leave in a file, and which Python 3.10 refuses."""
    return (line.replace("\0", "\ufffd") for line in lines)


def _to_number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _read_rows_before(path: Path, first_step: int, steps_per_epoch: int) -> list[list[str]]:
    """The rows of an earlier start that are still true when training continues from `first_step`."""
    if first_step == 0 or not path.is_file():
        return []
    kept = []
    with path.open(newline="", errors="replace") as file:  # after a power failure a line can hold anything
        for row in csv.reader(_without_nul(file)):
            # A killed process can leave half a row at the end.
            if len(row) != len(COLUMNS) or not (row[0].isdigit() and row[1].isdigit()):
                continue
            if (int(row[0]) - 1) * steps_per_epoch + int(row[1]) < first_step:
                kept.append(row)
    return kept
