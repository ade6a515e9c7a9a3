"""Peak memory of a training step for each workload and provider, beside the estimate of `--dry-run`.

    python -m benchmarks.step.memory [--workloads vit_huge:64 vit_huge:128] [--official CHECKOUT] [--out FOLDER]

Providers are described in benchmarks/step/providers.py (`project:recompute` checkpoints blocks). The measured step has
the largest masks of the first 32 and is made for the second time. `held` are weights, averages and moments, `peak` is
held plus what the step adds at its worst; the estimate, of this project's providers alone, is
`dmtjepa.training.estimate.memory_bytes` at the shapes of the same masks. On CUDA the allocator's own figures are used,
and for each of this project's providers the largest batch that fits is found: predicted by the line through the two
largest measured batches, then run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.machine import GIB, default_device
from benchmarks.official import add_official
from benchmarks.step.providers import Provider, open_official, parse_provider
from benchmarks.step.runs import Run, failed, failures_noted, problems, ratios
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import Workload, add_workloads, chosen_workloads
from dmtjepa.devices import check_device, release_memory
from dmtjepa.training.distributed import World, process_group
from dmtjepa.training.estimate import memory_bytes, resolve_checkpointing

MASKS = 32
DEFAULT_WORKLOADS = {"cpu": ["vit_small:4", "vit_small:8", "vit_small:16"], "cuda": ["vit_huge:64", "vit_huge:128"]}
# Share of the device's memory that a run can use. CUDA, NCCL and gaps in the allocator take the rest.
USABLE = 0.95


def measure(workload: Workload, provider: Provider, world: World) -> dict:
    """The memory of one step, or the error that it ended with."""
    row: dict = {**workload.description, "provider": provider.name}
    steps = sorted(range(MASKS), key=workload.flops)
    on_cuda = world.device.type == "cuda"
    if provider.code == "project":
        config, shapes = workload.config(*provider.settings), workload.mask_shapes(steps[-1])
        config = resolve_checkpointing(config, world.world_size, world.device)
        row["estimate_bytes"] = sum(memory_bytes(config, shapes, world.world_size, on_cuda).values())
    with failures_noted(row):
        run = Run(workload, provider, world)
        for step in (steps[0], steps[-1]):  # averages exist, and code for both is compiled
            run(step)
        row |= run.measure_memory(steps[-1])
        if "estimate_bytes" in row:
            row["estimate_error"] = row["estimate_bytes"] / row["peak_bytes"] - 1
    run = None
    release_memory(world.device)
    return row


def largest_batch(rows: list[dict], workload: Workload, provider: Provider, world: World) -> dict | None:
    """The row of the largest batch of this model that fits into the device.

    None if fewer than two batches were measured: the first guess lies on the line through the two largest.
    """
    alike = [row for row in rows if (row["model"], row["provider"]) == (workload.model, provider.name)]
    measured = [row for row in alike if "peak_bytes" in row]
    if len(measured) < 2:
        return None
    below, above = sorted(measured, key=lambda row: row["batch"])[-2:]
    slope = (above["peak_bytes"] - below["peak_bytes"]) / (above["batch"] - below["batch"])
    room = USABLE * torch.cuda.get_device_properties(world.device).total_memory - above["peak_bytes"]
    batch = above["batch"] + int(room / slope)
    for _ in range(5):
        row = measure(replace(workload, batch_size=batch), provider, world) | {"largest": True}
        if "error" not in row:
            return row
        batch = int(0.95 * batch)
    return row


COLUMNS = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"] + (", the largest that fits" if row.get("largest") else ""),
    "B": lambda row: str(row["batch"]),
    "held GiB": number("held_bytes", "{:.2f}", 1 / GIB),
    "step GiB": number("transient_bytes", "{:.2f}", 1 / GIB),
    "peak GiB": number("peak_bytes", "{:.2f}", 1 / GIB),
    "estimate": number("estimate_bytes", "{:.2f}", 1 / GIB),
    "is off by": number("estimate_error", "{:+.0%}"),
    "vs official": number("memory_vs_official", "{:.2f}x"),
    "vs reference": number("memory_vs_reference", "{:.2f}x"),
}


def plot(axes, rows: list[dict]) -> None:
    """Peak over batch, measured and estimated."""
    for place, key in enumerate(dict.fromkeys((row["model"], row["provider"]) for row in rows)):
        mine = [row for row in rows if (row["model"], row["provider"]) == key and "peak_bytes" in row]
        mine.sort(key=lambda row: row["batch"])
        batches = [row["batch"] for row in mine]
        axes.plot(batches, [row["peak_bytes"] / GIB for row in mine], f"oC{place}-", label=", ".join(key))
        if mine and "estimate_bytes" in mine[0]:
            axes.plot(batches, [row["estimate_bytes"] / GIB for row in mine], f"C{place}--", label="  its estimate")
    axes.set_xlabel("images per device")
    axes.set_ylabel("peak memory, GiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, DEFAULT_WORKLOADS[device])
    parser.add_argument("--providers", nargs="+", help="see benchmarks/step/providers.py")
    add_official(parser)
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    options = parser.parse_args()
    texts = options.providers or ["official"] * (options.official is not None) + ["project", "project:recompute"]
    open_official(options.official, texts)
    providers = [parse_provider(text, device) for text in texts]
    workloads = chosen_workloads(options)
    rows: list[dict] = []
    with process_group(check_device(device), start_timeout=60, hang_timeout=600) as world:
        for workload in workloads:
            for provider in providers:
                rows.append(measure(workload, provider, world))
                rows = [row | ratios(row, rows) for row in rows]
                save(options.out, "memory", device, rows, plot=plot)
        if device == "cuda":
            for workload in {workload.model: workload for workload in workloads}.values():
                for provider in providers:
                    row = largest_batch(rows, workload, provider, world) if provider.code == "project" else None
                    rows += [row] if row is not None else []
                    save(options.out, "memory", device, rows, plot=plot)
    print(text_table(COLUMNS, rows, num_names=2), *problems(rows), sep="\n\n")
    save(options.out, "memory", device, rows, plot=plot)
    if failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
