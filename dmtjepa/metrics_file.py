"""`metrics.jsonl`: what a run measures of itself, one JSON object a line, each with the step that it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmtjepa.files import open_atomically
from dmtjepa.log_file import LogFile

STEP = "step"


class MetricsFile:
    """Writes rows of metrics, after those that an earlier start of the run has left.

    A row is `{"step": 9, "eval/linear": 0.59}`: the number of the last finished step, from 0, and the values by name. A
    step may have several rows. A value that is not finite is written as null.

    Args:
        path: the file. Its rows of `first_step` and later, which a killed run has written, are removed.
        first_step: number of steps that are done.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        rows = [row for row in _read_rows(path) if row[STEP] < first_step] if path.is_file() else []
        with open_atomically(path) as file:
            file.writelines(map(_encode, rows))
        self._file = LogFile(path)

    def write(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Add a row, to be written by the next `flush`."""
        self._file.write(_encode({STEP: step, **values}))

    def flush(self) -> None:
        """Write the rows to the file. Those that cannot be written stay in memory until they can."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, in their order. Lines that are no rows, as a power failure can leave, are left out.

    Raises:
        OSError: the file cannot be read.
    """
    return list(_read_rows(path))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get(STEP)) is int:
                yield row


def _encode(row: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
