"""Computes the runs of a table, one after the other: train, evaluate, write result.json.

A run is killed and resumed as any run of `main.py` is. Several processes may share the work of one table: each takes
runs that no other process holds.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dmtjepa.files import write_json
from dmtjepa.metrics_file import read_metrics
from dmtjepa.processes import die_with_parent
from dmtjepa.run_folder import RunFolder
from experiments.table import ROOT, Run, Table, TableError

RESULT = "result.json"


class RunFailed(RuntimeError):
    """A program of a run ended with an error."""


def compute(table: Table, images: Path, out: Path, device: str = "cpu") -> list[str]:
    """Compute the runs of a table that have no result yet, each in a folder of its own below `out`.

    Args:
        images: labelled images: a folder that holds train/ and val/ or test/.

    Returns:
        The names of runs that failed. They are tried again at the next start.

    Raises:
        ConfigError, TableError, RunFolderError: a run is impossible, or its folder holds one of other settings or
            images, or cannot be written to.
    """
    runs = table.runs()
    for run in runs:  # all of them before the first is computed
        config = run.config(images, out / run.name)
        check_result(run, images, out / run.name)
        RunFolder.from_config(config).check(config, config.global_batch(1))
    failed = []
    for number, run in enumerate(runs, 1):
        folder = out / run.name
        with claimed(folder) as mine:
            if not mine or (folder / RESULT).is_file():
                continue
            print(f"[{number}/{len(runs)}] {run.name}", flush=True)
            try:
                train_and_measure(run, images, folder, device)
            except RunFailed as error:
                failed.append(run.name)
                print(f"  failed: {error}", flush=True)
    return failed


def check_result(run: Run, images: Path, folder: Path) -> None:
    """Refuse a folder with the result of other settings, or of images of another name. Raises TableError."""
    if not (folder / RESULT).is_file():
        return
    result = read_result(folder / RESULT)
    if (result.get("base"), result.get("settings")) != (run.base, list(run.settings)):
        raise TableError(f"{folder} holds the result of other settings; rename the variant or choose another --out")
    name = images.absolute().name
    if result.get("images", name) != name:
        raise TableError(f"{folder} holds a result on the images {result['images']}, not {name}; choose another --out")


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run. Raises TableError: the file is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise TableError(f"{path} cannot be read: {error}. Remove it, and run the table again") from None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a run, so that no other process computes it; False if another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".claim").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def train_and_measure(run: Run, images: Path, folder: Path, device: str) -> None:
    """Train, or continue to train, evaluate, and write the result. Raises RunFailed."""
    program = [sys.executable, str(ROOT / "main.py"), "--fname", str(run.base_path), "--devices", device]
    processor_seconds = call([*program, *run.overrides(images, folder)], folder / "train.log")
    program = [sys.executable, "-m", "dmtjepa.evaluation", str(folder.absolute()), "--device", device, "--quick"]
    call(program, folder / "evaluate.log")
    files = RunFolder.from_config(run.config(images, folder))
    times, starts = read_step_seconds(files.csv_file(0)), files.read_starts()
    own_steps = len(times) - starts[-1]["step"]
    result: dict[str, Any] = {
        "variant": run.variant,
        "seed": run.seed,
        "base": run.base,
        "settings": list(run.settings),
        "images": images.absolute().name,
        "steps": len(times),
        "train_seconds": round(sum(times), 1),
        # Of the last start and its steps: what earlier ones took may have been lost with the runner.
        "processor_seconds_per_step": round(processor_seconds / own_steps, 4) if own_steps else None,
        "starts": starts,
        "metrics": read_metrics(files.metrics_file) if files.metrics_file.is_file() else [],
        "report": json.loads((files.report / "report.json").read_text()),
    }
    write_json(folder / RESULT, result)


def read_step_seconds(path: Path) -> list[float]:
    """The time of each step in the CSV of a rank."""
    with path.open(newline="") as file:
        return [float(row["time (ms)"]) / 1000 for row in csv.DictReader(file)]


def call(command: Sequence[str], log: Path) -> float:
    """Run a program of the project on one thread until it ends; what it prints is added to `log`.

    Returns:
        The processor time that it took, with its own programs, in seconds. Other programs on the machine hardly matter.

    Raises:
        RunFailed: it ended with an error. KeyboardInterrupt: this process was asked to stop; so was the program, which
            has saved its state.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which passes it on once
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
        raise RunFailed(f"exit code {code}: {lines[-1]} (see {log})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
