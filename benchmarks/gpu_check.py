"""What only a GPU can show, in under 10 minutes: CUDA tests, then every benchmark, the most telling first.

    python -m benchmarks.gpu_check --out benchmarks/results [--published CHECKOUT] [--images FOLDER]
    python -m benchmarks.gpu_check --out benchmarks/results --only memory others   # the rest, or some again

Writes a folder named after the GPU and the day: each benchmark's JSON, each step's output, and `summary.json` with
hardware, versions, commit, what passed, and which of the goals of docs/performance.md are met; those of the whole step
are against the published code where a checkout of it is named, else against the reference. All of it is written as it
comes. What there was no time for is named with the command that runs it; its results join those of the same commit and
day.

Exits with 1 if a test failed or a result was wrong. The benchmarks run all the same: none times what differs from its
reference. Goals that are missed are printed and are no failure.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from benchmarks.data.loader import NEEDS
from benchmarks.machine import environment

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 9 * 60  # a minute is left for starting Python, and for the tables
OTHER_MODELS = ("vit_base:256", "vit_large:256")
OTHER_TESTS = (
    "tests/models", "tests/test_packing.py", "tests/masks",
    "tests/data/loaders/test_dali.py", "tests/data/test_augment.py", "tests/evaluation/test_features.py",
)  # fmt: skip
PRINTED_LINES = 60  # of each step's output, at the end
STATES = {0: "passed", 5: "no tests", None: "stopped: out of time"}  # by return code; any other is a failure


@dataclass(frozen=True)
class Step:
    """A command, and for how many seconds it may run."""

    name: str
    command: tuple[str, ...]
    seconds: float


def benchmark(name: str, module: str, out: Path, seconds: float, *options: str) -> Step:
    command = (sys.executable, "-m", f"benchmarks.{module}", "--out", str(out), *options)
    return Step(name, command, seconds)


def steps(out: Path, images: Path | None, published: Path | None) -> list[Step]:
    """What is run, the most telling first."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    theirs = ("--published", str(published)) if published else ()
    found = [
        Step("operator-tests", (*pytest, "tests/kernels"), 200),
        Step("training-tests", (*pytest, "tests/training"), 120),
        benchmark("targets", "step.target_head", out, 60, "--shapes", "huge:128", *theirs),
        benchmark("step", "step.speed", out, 220, "--models", "vit_huge:128", *theirs),
        benchmark("operators", "operators.speed", out, 150, "--shapes", "huge"),
        benchmark("profile", "step.profile", out, 100),
        benchmark(
            "memory", "step.memory", out, 130, "--providers", "project", *(["published"] if published else []), *theirs
        ),
        benchmark("others", "step.speed", out / "others", 200, "--models", *OTHER_MODELS, *theirs),
    ]
    if images is not None:
        command = (sys.executable, "-m", "benchmarks.data.loader", str(images), "--device", "cuda")
        found.append(Step("loader", (*command, "--json", str(out / "loader.json")), 120))
        found.append(benchmark("data_wait", "data.data_wait", out, 150, str(images), "--model", OTHER_MODELS[1]))
    found.append(Step("other-tests", (*pytest, *OTHER_TESTS), 150))
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", "--report-api-errors", "no", *pytest, "tests/kernels")
        found.append(Step("sanitizer", (*command, "-k", "strides or covered_patches or cropped"), 150))
    return found


def run(step: Step, out: Path, seconds_left: float) -> dict:
    """Runs a step, its output into a file; the return code is None if it was stopped or there was no time for it."""
    seconds = min(step.seconds, seconds_left)
    log = out / f"{step.name}.log"
    row = {"name": step.name, "command": " ".join(step.command), "return_code": None, "seconds": 0.0, "log": log.name}
    if seconds <= 5:
        return row
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            environment_variables = {**os.environ, "TRITON_INTERPRET": "0"}
            if step.name == "sanitizer":  # what lies in cached memory behind a tensor would hide that it was overrun
                environment_variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment_variables, stdout=file, stderr=file, timeout=seconds
            )
            row["return_code"] = done.returncode
        except subprocess.TimeoutExpired:
            pass
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


# Of the measured copy bandwidth.
LEAST_SHARE = {
    "gather_tokens": 0.80,
    "embed_patches": 0.80,
    "select_neighbors": 0.70,
    "aggregate_neighbors": 0.70,
    "pool_neighbors": 0.70,
}
# Of the whole step: speed against the published code, and MFU.
LEAST_SPEED = {"ViT-huge": (2.0, 0.48), "ViT-large": (2.1, 0.44), "ViT-base": (2.3, 0.38)}


def goals(out: Path, commit: str | None) -> dict[str, bool]:
    """The goals of docs/performance.md that the results of this commit in `out` decide."""
    rows = []
    for path in sorted(out.rglob("*.json")):
        document = json.loads(path.read_text())
        if document.get("commit") == commit:
            rows += document.get("rows", [])
    return operator_goals(rows) | target_goals(rows) | step_goals(rows) | data_goals(rows)


def operator_goals(rows: list[dict]) -> dict[str, bool]:
    timed = [row for row in rows if row.get("provider") == "triton" and "ms" in row]
    found = {}
    for row in timed:
        what = f"{row['operator']}, {row['shape']}"
        share = LEAST_SHARE.get(row["operator"].split()[0])
        if share:
            found[f"{what}: at least {share:.0%} of copy bandwidth ({row['of_copy']:.0%})"] = row["of_copy"] >= share
        if ratio := row["speed_vs"].get("compile"):
            found[f"{what}: faster than torch.compile ({ratio:.2f}x)"] = ratio > 1
    neighbors = ("select_neighbors", "aggregate_neighbors", "pool_neighbors")
    own = {row["operator"]: row["ms"] for row in timed if row["operator"] in neighbors}
    eager = {row["operator"]: row["ms"] for row in rows if row.get("provider") == "eager" and row["operator"] in own}
    if len(own) == len(eager) == 3:
        ratio = sum(eager.values()) / sum(own.values())
        found[f"selection and aggregation: at least 3x eager ({ratio:.1f}x)"] = ratio >= 3
    return found


def target_goals(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for row in rows:
        if row.get("provider") == "this project" and "time_of_reference" in row:
            speed, memory = 1 / row["time_of_reference"], row["memory_of_reference"]
            what = f"target head, {row['shape']} B={row['batch']}"
            found[f"{what}: at least 5x the reference ({speed:.1f}x)"] = speed >= 5
            found[f"{what}: at most 0.15x its memory ({memory:.2f}x)"] = memory <= 0.15
    return found


def step_goals(rows: list[dict]) -> dict[str, bool]:
    """Of the fastest provider of each model, and of the float8 teacher against it."""
    found = {}
    timed = [row for row in rows if "mfu" in row and row["provider"].startswith("project")]
    for model in dict.fromkeys(row["model"] for row in timed):
        mine = sorted((row for row in timed if row["model"] == model), key=lambda row: row["images_per_s"])
        plain, fp8 = ([row for row in mine if ("fp8" in row["provider"]) == wanted] for wanted in (False, True))
        if plain and fp8:
            gain = fp8[-1]["images_per_s"] / plain[-1]["images_per_s"] - 1
            found[f"{model}: float8 teacher at least 10% faster ({gain:+.0%})"] = gain >= 0.10
        least = LEAST_SPEED.get(model.partition("/")[0])
        if not plain or least is None:
            continue
        row = plain[-1]
        other = "published" if "speed_vs_published" in row else "reference"
        speed, memory = row.get(f"speed_vs_{other}"), row.get(f"memory_vs_{other}")
        if speed is not None:
            found[f"{model}: at least {least[0]}x the {other} step ({speed:.2f}x)"] = speed >= least[0]
        if memory is not None:
            found[f"{model}: at most 0.5x the memory of the {other} step ({memory:.2f}x)"] = memory <= 0.5
        found[f"{model}: MFU of at least {least[1]:.0%} ({row['mfu']:.1%})"] = row["mfu"] >= least[1]
    return found


def data_goals(rows: list[dict]) -> dict[str, bool]:
    """Of DALI against the rate at which ViT-L trains: of the measured step, without one of its prediction."""
    steps = [row for row in rows if "mfu" in row and row["model"].startswith("ViT-large")]
    need = max((row["images_per_s"] for row in steps), default=NEEDS["H100"]["ViT-L/16"])
    found = {}
    for row in rows:
        if row.get("loader", "").startswith("dali") and "images_per_second" in row:
            ratio = row["images_per_second"] / need
            found[f"{row['loader']}: at least 2x the images/s of training ViT-L ({ratio:.1f}x)"] = ratio >= 2
        if "data_wait_share" in row:
            share = row["data_wait_share"]
            found[f"{row['model']}: waits for data in less than 2% of the time ({share:.1%})"] = share < 0.02
    return found


def summarize(out: Path, rows: list[dict]) -> dict:
    """Write `summary.json`: these steps, and those of this commit that an earlier call made."""
    path, summary = out / "summary.json", environment("cuda")
    before = json.loads(path.read_text()) if path.exists() else {}
    again = {row["name"] for row in rows}
    if before.get("commit") == summary["commit"]:
        rows = [*(row for row in before["steps"] if row["name"] not in again), *rows]
    summary |= {"steps": rows, "goals": goals(out, summary["commit"])}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    unfinished.replace(path)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder of results")
    parser.add_argument("--published", type=Path, help="a checkout of the published code, to compare with")
    parser.add_argument("--images", type=Path, help="a folder of photographs, to measure the loaders too")
    parser.add_argument("--seconds", type=float, default=TIME_LIMIT, help="after which nothing is started or goes on")
    parser.add_argument("--only", nargs="+", help="names of steps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device, and torch sees none (torch.cuda.is_available() is False)")

    start = time.perf_counter()
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    out = (options.out / f"{name}-{date.today()}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    images, published = (path and path.resolve() for path in (options.images, options.published))
    wanted = steps(out, images, published)
    if options.only:
        names = [step.name for step in wanted]
        if unknown := set(options.only) - set(names):
            raise SystemExit(f"--only {' '.join(sorted(unknown))}: choose of {', '.join(names)}")
        wanted = [step for step in wanted if step.name in options.only]
    rows = []
    for step in wanted:
        row = run(step, out, options.seconds - (time.perf_counter() - start))
        rows.append(row)
        state = STATES.get(row["return_code"], "FAILED")
        print(f"{step.name:<28}{state:<24}{row['seconds']:>7.1f} s   {out / row['log']}", flush=True)
        summary = summarize(out, rows)
    for row in rows:
        log = out / row["log"]
        if row["seconds"]:
            print(f"\n---- {row['name']}", *log.read_text(errors="replace").splitlines()[-PRINTED_LINES:], sep="\n")
    print()
    for goal, met in summary["goals"].items():
        print(f"{'met   ' if met else 'MISSED'}  {goal}")
    print(f"results: {out}")
    if left := [row["name"] for row in rows if row["return_code"] is None]:
        print(f"out of time; for the rest, the same command with: --only {' '.join(left)}")
    raise SystemExit(any(row["return_code"] not in STATES for row in rows))


if __name__ == "__main__":
    main()
