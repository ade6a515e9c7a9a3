"""A training step on several processes: images/s, efficiency, and the time spent waiting for other processes.

    python -m benchmarks.step.scaling --processes 1 2 [--workload vit_small:8] [--out FOLDER]
    torchrun --nproc-per-node 8 [--nnodes ...] -m benchmarks.step.scaling --workload vit_huge:128 --out FOLDER

The first form starts torchrun on this machine once for each number of processes. The second measures the world it is
started in, one GPU per process with NCCL, or CPUs with gloo; under SLURM start it with srun on each node. Each
measurement adds a file to FOLDER, and the table is of all that are in it.

Weak scaling keeps the batch of a process, strong scaling divides the first world's batch among all. Efficiency is
images/s per process over that of the smallest world in FOLDER. `waiting` is the share of a profiled step in which
collectives run and nothing else does. On A100, H100 and H200 the efficiency that `communication_model` predicts stands
beside the measured one. Masks are cut alike on all ranks (mask.context_cut: global), as they should be at scale.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from benchmarks.machine import default_device
from benchmarks.predictions import PREDICTIONS
from benchmarks.step.communication import A100, H100, official_model, predict
from benchmarks.step.providers import Provider, parse_provider
from benchmarks.step.runs import CHECKED_STEPS, Run
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import Workload, add_workload, parse_workload
from dmtjepa.devices import check_device, release_memory
from dmtjepa.training.distributed import World, process_group

MACHINES = {"A100": A100, "H100": H100, "H200": H100}
# The share of a CPU's intervals that are computation, by their names; collectives are gloo's or NCCL's.
COLLECTIVES = ("gloo:", "nccl")
COMPUTATION = ("aten::", "dmtjepa::", "mkldnn::", "cpp_fused", "Torch-Compiled")


def measure(workload: Workload, provider: Provider, world: World, warmup: int, steps: int) -> dict:
    """Median over the steps of the slowest rank's time, on every rank."""
    run = Run(workload, provider, world)
    numbers = range(CHECKED_STEPS + warmup, CHECKED_STEPS + warmup + steps)
    for step in range(numbers.start):
        run(step)
    for step in numbers:
        run.masks(step)
    dist.barrier()
    for step in numbers:
        run.time(step)
    times = torch.tensor([phases["step"] for phases in run.seconds()], device=world.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    seconds = statistics.median(times.tolist())
    waiting = torch.tensor(waiting_share(run, numbers[-1]), device=world.device)
    dist.all_reduce(waiting)
    images = workload.batch_size * world.world_size
    return {
        **workload.description,
        "provider": provider.name,
        "processes": world.world_size,
        "global_batch": images,
        "ms": 1e3 * seconds,
        "images_per_s": images / seconds,
        "waiting": float(waiting) / world.world_size,
    }


def waiting_share(run: Run, step: int) -> float:
    """Share of a step in which this rank's collectives run and nothing else does."""
    on_cuda = run.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run(step)
    kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == kind]
    if not events:  # on a stand-in for a GPU no kernel runs
        return 0.0
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    names = [event.name for event in events]
    collective = [span for span, name in zip(spans, names, strict=True) if name.startswith(COLLECTIVES)]
    computing = [
        span
        for span, name in zip(spans, names, strict=True)
        if (on_cuda and not name.startswith(COLLECTIVES)) or name.startswith(COMPUTATION)
    ]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return (covered([*collective, *computing]) - covered(computing)) / whole


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def predicted_efficiency(row: dict, hardware: str) -> float | None:
    """By `communication_model`, against one GPU's computation; None for other GPUs, CPUs and models."""
    machine = next((machine for name, machine in MACHINES.items() if name in hardware), None)
    letter = row["model"].removeprefix("vit_")[0].upper()
    name = next((name for name in PREDICTIONS if name.startswith(f"ViT-{letter}/")), None)
    model = None if name is None else official_model(name)
    if machine is None or model is None or row["scaling"] != "weak" or row["batch"] != model.batch:
        return None
    return model.seconds[machine.name[:4]] / predict(model, machine, row["processes"], hybrid=False)


def collect(out: Path) -> list[dict]:
    """All measurements in a folder, with their efficiency against the smallest world of the same kind."""
    rows = []
    for path in out.glob("*-scaling-*.json"):
        document = json.loads(path.read_text())
        rows += [row | {"predicted": predicted_efficiency(row, document["hardware"])} for row in document["rows"]]
    rows.sort(key=lambda row: (row["model"], row["provider"], row["scaling"], row["processes"]))
    for row in rows:
        key = ("model", "provider", "scaling")
        first = next(other for other in rows if all(other[name] == row[name] for name in key))
        row["efficiency"] = row["images_per_s"] / row["processes"] * first["processes"] / first["images_per_s"]
    return rows


COLUMNS = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "scaling": lambda row: row["scaling"],
    "processes": number("processes", "{:d}", 1),
    "B each": number("batch", "{:d}", 1),
    "ms": number("ms"),
    "images/s": number("images_per_s"),
    "efficiency": number("efficiency", "{:.0%}"),
    "predicted": number("predicted", "{:.0%}"),
    "waiting": number("waiting", "{:.0%}"),
}


def plot(axes, rows: list[dict]) -> None:
    """Images/s over processes, and what an efficiency of 1 would be."""
    for place, key in enumerate(dict.fromkeys((row["model"], row["provider"], row["scaling"]) for row in rows)):
        mine = [row for row in rows if (row["model"], row["provider"], row["scaling"]) == key]
        counts = [row["processes"] for row in mine]
        axes.plot(counts, [row["images_per_s"] for row in mine], f"oC{place}-", label=", ".join(key))
        axes.plot(counts, [row["images_per_s"] / row["efficiency"] for row in mine], f"C{place}:")
    axes.set_xlabel("processes")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def launch(options: argparse.Namespace, out: Path) -> None:
    """One torchrun on this machine for each number of processes."""
    passed = [*sys.argv[1:], "--out", str(out), "--first-world", str(options.processes[0])]
    for count in options.processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        threads = {"OMP_NUM_THREADS": str(max(1, options.threads // count))}
        command += ["-m", "benchmarks.step.scaling", *passed]
        subprocess.run(command, check=True, env={**os.environ, **threads})


def main() -> None:
    device = default_device()
    default = "vit_huge:128" if device == "cuda" else "vit_small:8"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="worlds to start on this machine")
    add_workload(parser, default)
    parser.add_argument("--provider", default="project", help="see benchmarks/step/providers.py")
    parser.add_argument("--scaling", nargs="+", choices=["weak", "strong"], default=["weak", "strong"])
    parser.add_argument("--steps", type=int, default=5 if device == "cpu" else 20)
    parser.add_argument("--warmup", type=int, default=0 if device == "cpu" else 5)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU, divided among its processes")
    parser.add_argument("--first-world", type=int, default=1, help="processes whose batch strong scaling divides")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of each world, and a plot")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as temporary:
            launch(options, options.out or Path(temporary))
        return

    provider = parse_provider(options.provider, device)
    workload = parse_workload(options.workload, ["mask.context_cut=global", *options.set])
    local = int(os.environ.get("LOCAL_RANK", 0))
    rows = []
    with process_group(check_device(device, local), start_timeout=300, hang_timeout=600) as world:
        for scaling in options.scaling:
            batch = workload.batch_size
            if scaling == "strong":
                batch = batch * options.first_world // world.world_size
            row = measure(replace(workload, batch_size=batch), provider, world, options.warmup, options.steps)
            rows.append({"scaling": scaling, **row})
            release_memory(world.device)
        if world.rank == 0 and options.out:
            save(options.out, f"scaling-{world.world_size}", device, rows)
            print(text_table(COLUMNS, collect(options.out), num_names=3), flush=True)


if __name__ == "__main__":
    main()
