"""The results of a table as one file, to be kept beside what quotes them. It names no folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmtjepa.files import write_json
from experiments.summary import Result, read_results
from experiments.table import TableError

_ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:[^\s/\"',]+/)*([^\s/\"',]+)/?")


def publish_results(folder: Path, out: Path, *, command: str, hardware: str | None = None, note: str = "") -> None:
    """Write all results below `folder` into the file `out`.

    Args:
        command: that made them.
        hardware: that they were made on. None takes what the runs have recorded.
        note: what a reader must know.

    Raises:
        TableError: there is no result, or `out` exists.
    """
    if out.exists():
        raise TableError(f"{out} exists; choose another --out")
    results = sorted(read_results(folder), key=lambda result: (result["seed"], result["variant"]))
    starts = [start for result in results for start in result.get("starts", [])]
    packages = {name: None for start in starts for name in start.get("packages", {})}
    document = {
        "command": [command],
        "hardware": hardware or _join(map(_describe_hardware, starts)),
        "versions": {
            "python": _join(start.get("python") for start in starts),
            **{name: _join(start.get("packages", {}).get(name) for start in starts) for name in packages},
        },
        "note": note,
        "runs": [shorten(result) for result in results],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, remove_folders(document))


def shorten(result: Result) -> Result:
    """A result with the looks and evaluations alone of its metrics, and step and commit alone of its starts.

    In a table, `explained` and `between images` are then averages over looks.
    """
    rows = result.get("metrics", [])
    metrics = [row for row in rows if row.get("features/effective_rank") is not None or "eval/seconds" in row]
    starts = [{name: start.get(name) for name in ("step", "commit")} for start in result.get("starts", [])]
    return result | {"metrics": metrics, "starts": starts}


def remove_folders(value: Any) -> Any:
    """JSON values with the last part alone of each absolute path in their texts."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, list):
        return [remove_folders(item) for item in value]
    if isinstance(value, dict):
        return {name: remove_folders(item) for name, item in value.items()}
    return value


def _describe_hardware(start: dict[str, Any]) -> str | None:
    return f"{start['device']}, {start['cpus']} CPUs" if {"device", "cpus"} <= start.keys() else None


def _join(values: Iterable[str | None]) -> str | None:
    """What all runs have in common, or else each of the values."""
    return ", ".join(sorted({value for value in values if value is not None})) or None
