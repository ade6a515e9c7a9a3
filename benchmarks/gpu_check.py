"""CUDA tests and every benchmark, the most telling first, in calls of under 10 minutes.

    python -m benchmarks.gpu_check --out benchmarks/results [--official CHECKOUT] [--images FOLDER]
    python -m benchmarks.gpu_check --out benchmarks/results --only memory others   # the rest, or some again
    python -m benchmarks.gpu_check --out results --part 1 --archive part1.tar.gz   # then parts 2 and 3

On a machine that has torch and Triton but no package registry: benchmarks/carry.sh. Before it is there, on a tiny model
(its times and goals mean nothing): python -m tools.fake_cuda benchmarks/carry.sh run --rehearsal --part 1 --out build

The program writes a folder named after the GPU and the day: the JSON file of each benchmark, the output of each step,
and `summary.json` with hardware, versions, commit, the steps that passed, and the goals of docs/performance.md that are
met; and all of it as tables, `tables.md`. Goals of the whole step compare with the official code if a checkout of it is
given, otherwise with the reference.
All files are written as results come. At the end the program prints the command for the steps that it had no time for;
their results join those of the same commit and day.

The exit code is 1 if a test failed or a result was wrong. The other steps still run, since no benchmark times a result
that differs from its reference. A missed goal is printed and is not a failure.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.goals import goals
from benchmarks.machine import environment, portable_command
from benchmarks.official import add_official
from benchmarks.page import find_program, make_page
from benchmarks.tables import add_time_anyway

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 10 * 60
MARGIN = 60  # seconds before the time limit at which steps end: for starting Python, tables and the archive
ARCHIVE_BYTES = 16 * 10**6  # at most
OTHER_TESTS = (
    "tests/models", "tests/test_packing.py", "tests/masks",
    "tests/data/loaders/test_dali.py", "tests/data/test_augment.py", "tests/evaluation/test_features.py",
)  # fmt: skip
PRINTED_LINES = 60  # of each step's output, at the end
# Appended in a rehearsal; the last of two equal options counts. Tests are imported, but not run.
TINY = ("--set", "data.crop_size=96", "mask.min_keep=2", "meta.pred_depth=1", "meta.pred_emb_dim=16")
REHEARSAL = {
    "pytest": ("--collect-only", "-q"),
    "benchmarks.step.attention": ("--lengths", "48", "--head-sizes", "24", "--batch", "2"),
    "benchmarks.step.profile": ("--workload", "vit_nano:2", *TINY, "--steps", "1"),
    "benchmarks.step.speed": ("--workloads", "vit_nano:2", *TINY, "--warmup", "0", "--steps", "3"),
    "benchmarks.step.host": ("--workloads", "vit_nano:2", *TINY, "--warmup", "1", "--steps", "2"),
    "benchmarks.step.target_head": ("--workloads", "vit_nano:2", *TINY, "--repeats", "3"),
    "benchmarks.step.memory": ("--workloads", "vit_nano:2", *TINY),
    "benchmarks.step.scaling": ("--workload", "vit_nano:2", *TINY, "--warmup", "0", "--steps", "1"),
    "benchmarks.operators.speed": ("--workloads", "vit_nano:2", *TINY),
    "benchmarks.data.loader": ("--images", "64"),
    "benchmarks.data.data_wait": ("--workload", "vit_nano:2", *TINY, "--steps", "20", "--warmup", "10"),
}
STATES = {0: "passed", 5: "no tests", None: "stopped: out of time"}  # by return code; any other is a failure


@dataclass(frozen=True)
class Step:
    """A command, for how many seconds it may run, and in which part of a check in three calls."""

    name: str
    command: tuple[str, ...]
    seconds: float
    part: int = 3


def benchmark(part: int, name: str, module: str, out: Path, seconds: float, *options: str) -> Step:
    command = (sys.executable, "-m", f"benchmarks.{module}", "--out", str(out), *options)
    return Step(name, command, seconds, part)


def steps(
    out: Path, images: Path | None, official: Path | None, time_anyway: bool = False, *, num_gpus: int = 1
) -> list[Step]:
    """The steps, the most telling first."""
    # A file that cannot be imported where a package is missing does not end the others.
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    pytest += ("--continue-on-collection-errors",)
    compare = ("--official", str(official)) if official else ()
    theirs = ("official",) if official else ()
    anyway = ("--time-anyway",) if time_anyway else ()
    huge, small = ("--workloads", "vit_huge:128"), ("--workloads", "vit_small:64", "vit_small:256")
    base, large = "vit_base:256", "vit_large:256"
    compared = ("--providers", *(("official", "project") if official else ("project", "reference")), *compare, *anyway)
    graphs = ("--providers", "project", "project:fused", "project:fused:graphs")
    choices = ("--providers", "project", "project:keep", "project:fused")
    found = [
        Step("operator-tests", (*pytest, "tests/kernels"), 100, 1),
        Step("graphs-tests", (*pytest, "tests/training/test_gpu.py", "-k", "graphs or replayed"), 70, 1),
        benchmark(1, "attention", "step.attention", out, 80),
        benchmark(1, "profile", "step.profile", out, 100),
        benchmark(1, "step", "step.speed", out, 190, *huge, *compare, *anyway),
        benchmark(2, "base", "step.speed", out / "base", 110, "--workloads", base, *compared),
        benchmark(2, "large", "step.speed", out / "large", 130, "--workloads", large, *compared),
        benchmark(2, "profile-base", "step.profile", out / "base", 80, "--workload", base),
        benchmark(2, "small", "step.speed", out / "small", 100, *small, *graphs, *anyway),
        benchmark(2, "host-small", "step.host", out / "small", 40, "--workloads", "vit_small:64", *graphs),
        benchmark(2, "huge", "step.speed", out / "huge", 110, *huge, *choices, *anyway),
        # Alone: how long it tunes on a GPU has not been measured.
        benchmark(
            2, "autotune", "step.speed", out / "autotune", 110, *huge, "--providers", "project:autotune", *anyway
        ),
        benchmark(2, "host", "step.host", out, 60),
        benchmark(3, "operators", "operators.speed", out, 120, *huge, *anyway),
        benchmark(3, "targets", "step.target_head", out, 60, *huge, *compare, *anyway),
        benchmark(3, "memory", "step.memory", out, 120, "--providers", "project", *theirs, *compare),
        # Not the whole folder: other files of it import what a bare machine lacks, which counts as a failure.
        Step("training-tests", (*pytest, "tests/training/test_gpu.py", "-k", "not two-"), 120),
        Step("other-tests", (*pytest, *OTHER_TESTS), 100),
    ]
    if num_gpus > 1:
        found.append(Step("several-gpus-tests", (*pytest, "tests/training/test_gpu.py", "-k", "two-"), 300))
        processes = ("--processes", "1", str(num_gpus))
        found.append(benchmark(3, "scaling", "step.scaling", out, 240, "--workload", "vit_huge:128", *processes))
    if images is not None:
        command = (sys.executable, "-m", "benchmarks.data.loader", str(images), "--device", "cuda")
        found.append(Step("loader", (*command, "--json", str(out / "loader.json")), 120))
        found.append(benchmark(3, "data_wait", "data.data_wait", out, 150, str(images), "--workload", large))
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", "--report-api-errors", "no", *pytest, "tests/kernels")
        found.append(Step("sanitizer", (*command, "-k", "strides or covered_patches or cropped"), 150))
    return found


def rehearse(step: Step) -> Step:
    """The step on a tiny model, the tests only imported, and without a limit of its own: the machine may be slow."""
    module = step.command[step.command.index("-m") + 1]
    return replace(step, command=(*step.command, *REHEARSAL[module]), seconds=math.inf)


def run(step: Step, out: Path, seconds_left: float) -> dict:
    """Run a step, its output into a file; the return code is None if it was stopped or if there was no time for it."""
    seconds = min(step.seconds, seconds_left)
    log = out / f"{step.name}.log"
    row = {
        "name": step.name,
        "command": portable_command(step.command),
        "return_code": None,
        "seconds": 0.0,
        "log": log.name,
    }
    if seconds <= 5:
        return row
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            environment_variables = {**os.environ, "TRITON_INTERPRET": "0"}
            if step.name == "sanitizer":  # cached memory behind a tensor would hide an overrun
                environment_variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            row["return_code"] = end_within(seconds, step.command, environment_variables, file)
        except subprocess.TimeoutExpired:
            pass
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def end_within(seconds: float, command: tuple[str, ...], variables: dict[str, str], output: TextIO) -> int:
    """Run a command; when the time is over, stop it and the processes it started, which may use the GPU, too."""
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarize(out: Path, rows: list[dict], rehearsal: bool = False) -> dict:
    """Write `summary.json`: these steps, and the steps of earlier calls at this commit."""
    path, summary = out / "summary.json", environment("cuda")
    before = json.loads(path.read_text()) if path.exists() else {}
    again = {row["name"] for row in rows}
    if before.get("commit") == summary["commit"]:
        rows = [*(row for row in before["steps"] if row["name"] not in again), *rows]
    summary |= {"steps": rows, "goals": {} if rehearsal else goals(out, summary["commit"])}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    unfinished.replace(path)
    if documents := documents_of(out, summary["commit"]):
        (out / "tables.md").write_text(make_page(documents))
    return summary


def documents_of(out: Path, commit: str | None) -> dict[str, dict]:
    """Files of results of a commit that have tables, by their place in the folder `out`."""
    found = {}
    for path in sorted(out.rglob("*.json")):
        document = json.loads(path.read_text())
        if document.get("commit") == commit and find_program(document) is not None:
            found[str(path.relative_to(out))] = document
    return found


def write_archive(out: Path, archive: Path, most: int = ARCHIVE_BYTES) -> list[str]:
    """Write the files of the folder `out` into a .tar.gz file of at most `most` bytes.

    Returns:
        The files that had no room: the largest ones, which are traces.
    """
    paths = sorted((path for path in out.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    left_out: list[str] = []
    unfinished = archive.with_name(f".{archive.name}.unfinished")
    while True:
        with tarfile.open(unfinished, "w:gz") as file:
            for path in paths:
                file.add(path, f"{out.name}/{path.relative_to(out)}")
        if unfinished.stat().st_size <= most or not paths:
            unfinished.replace(archive)
            return left_out
        left_out.append(str(paths.pop().relative_to(out)))


def choose(found: list[Step], names: list[str] | None, part: int | None) -> list[Step]:
    """The steps of these names, or of a part, or all."""
    if names is None:
        return [step for step in found if part in (None, step.part)]
    known = [step.name for step in found]
    if unknown := set(names) - set(known):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: choose of {', '.join(known)}")
    return [step for step in found if step.name in names]


def report(out: Path, rows: list[dict], summary: dict) -> None:
    """Print the end of each step's output, the goals, and the command for what there was no time for."""
    for row in rows:
        log = out / row["log"]
        if row["seconds"]:
            print(f"\n---- {row['name']}", *log.read_text(errors="replace").splitlines()[-PRINTED_LINES:], sep="\n")
    print()
    for goal, met in summary["goals"].items():
        print(f"{'met   ' if met else 'MISSED'}  {goal}")
    print(f"results: {out}")
    if left := [row["name"] for row in rows if row["return_code"] is None]:
        print(f"out of time; for the rest, the same command with this instead of --part: --only {' '.join(left)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder of results")
    add_official(parser)
    parser.add_argument("--images", type=Path, help="a folder of photographs, to measure the loaders too")
    limit_help = f"time limit of this command, {TIME_LIMIT}; steps end {MARGIN} seconds before it"
    parser.add_argument("--seconds", type=float, default=TIME_LIMIT, help=limit_help)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", metavar="STEP", help="names of steps")
    chosen.add_argument("--part", type=int, choices=(1, 2, 3), help="a third of the steps; each fits into one call")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="all results as one .tar.gz of at most 16 MB")
    rehearsal_help = "a tiny model and few steps, tests imported only: whether everything starts here; no goals"
    parser.add_argument("--rehearsal", action="store_true", help=rehearsal_help)
    add_time_anyway(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device, and torch sees none (torch.cuda.is_available() is False)")

    start = time.perf_counter()
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    out = (options.out / f"{name}-{date.today()}{'-rehearsal' * options.rehearsal}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    images, official = (path and path.resolve() for path in (options.images, options.official))
    # In a rehearsal on a stand-in, all values are zero.
    anyway = options.time_anyway or options.rehearsal
    found = steps(out, images, official, anyway, num_gpus=torch.cuda.device_count())
    wanted = choose([rehearse(step) for step in found] if options.rehearsal else found, options.only, options.part)
    rows: list[dict] = []
    for step in wanted:
        row = run(step, out, options.seconds - MARGIN - (time.perf_counter() - start))
        rows.append(row)
        state = STATES.get(row["return_code"], "FAILED")
        print(f"{step.name:<28}{state:<24}{row['seconds']:>7.1f} s   {out / row['log']}", flush=True)
        summary = summarize(out, rows, options.rehearsal)
        if options.archive is not None:  # after each step, in case this process is stopped
            left_out = write_archive(out, options.archive)
    report(out, rows, summary)
    if options.archive is not None:
        print(f"archive: {options.archive}", *(f"without {name}" for name in left_out), sep=", ")
    raise SystemExit(any(row["return_code"] not in STATES for row in rows))


if __name__ == "__main__":
    main()
