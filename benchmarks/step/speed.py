"""Speed and memory of the whole training step: this project, its reference and the official code.

    python -m benchmarks.step.speed [--workloads vit_huge:128 vit_base:256] [--official CHECKOUT] [--out FOLDER]
    python -m benchmarks.step.speed --providers project:bfloat16:compiled:sdpa project:float32:eager reference

All providers make the same sequence of steps; benchmarks/step/providers.py describes them. The phases of a step are
targets, head, predictions, loss, backward, update (gradient norm and AdamW) and teacher (its average). The program
prints the median and the 95th percentile of the steps, images/s and MFU at the median, the peak of the memory, and the
median of each phase.

- Loss and gradient norm of the first steps are compared with those of the reference in float32. A provider that differs
  is not timed (but see --time-anyway), and the program exits with 1. (The official code is checked at B = 1 and by its
  loss alone: for B > 1 its queries come from other images.)
- MFU counts the FLOPs of the lean step (`dmtjepa.training.estimate.step_flops`) at the shapes of the masks of each
  step, for every provider alike. The peak is that of the data sheet on A100, H100 and H200 in bfloat16, and otherwise
  that of a measured product of square matrices.
- Memory is `held` (weights, averages, moments) and `peak` (held plus what a step adds at its worst), of the step with
  the most work. On a CPU it is counted from PyTorch's allocations (without the buckets of the official code's
  DistributedDataParallel), on CUDA it is what the allocator reports.
- On a CPU the providers make each step in turn. Phases are timed by events in the stream, so nothing waits between
  steps except where the provider itself does. The reference counts its head as part of `targets`.
- Waiting for data is not included; the trainer's log and `benchmarks.data.data_wait` show it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.machine import GIB, default_device
from benchmarks.official import add_official
from benchmarks.step.providers import PHASES, open_official, parse_provider
from benchmarks.step.runs import failed, measure_steps, problems, ratios
from benchmarks.tables import add_time_anyway, number, save, text_table
from benchmarks.workloads import add_workloads, chosen_workloads
from dmtjepa.devices import check_device
from dmtjepa.training.distributed import process_group

DEFAULT_WORKLOADS = {"cpu": ["vit_small:16"], "cuda": ["vit_huge:128", "vit_large:256", "vit_base:256"]}


def default_providers(device: str, official: bool) -> list[str]:
    """All providers; the official code only if a checkout of it was given."""
    if device == "cpu":
        found = ["reference:float32", "project:float32:eager", "project:float32:compiled", "project:bfloat16:compiled"]
        return ["official:float32"] * official + found
    fp8 = ["project:fp8"] * (torch.cuda.get_device_capability() >= (9, 0))
    # What the goals compare comes first, in case the program is stopped.
    return ["official", "project", *fp8, "reference"] if official else ["project", "reference", *fp8]


COLUMNS = {
    "workload": lambda row: row["workload"],
    "provider": lambda row: row["provider"],
    "images/s": number("images_per_s"),
    "ms": number("ms"),
    "p95": number("ms_p95"),
    "MFU": number("mfu", "{:.1%}"),
    "held GiB": number("held_bytes", "{:.2f}", 1 / GIB),
    "peak GiB": number("peak_bytes", "{:.2f}", 1 / GIB),
    "vs official": number("speed_vs_official", "{:.2f}x"),
    "memory": number("memory_vs_official", "{:.2f}x"),
    "vs reference": number("speed_vs_reference", "{:.2f}x"),
    "error": number("error_first", "{:.0e}"),
    "later": number("error_later", "{:.0e}"),
}
PHASE_COLUMNS = {
    "workload": lambda row: row["workload"],
    "ms of": lambda row: row["provider"],
    **{phase: (lambda row, phase=phase: number(phase)(row.get("phases_ms", {}))) for phase in PHASES},
}


def plot(axes, rows: list[dict]) -> None:
    """Milliseconds per image of each provider, divided into phases."""
    rows = [row for row in rows if "phases_ms" in row][::-1]
    labels = [f"{row['workload']}, {row['provider']}" for row in rows]
    left = [0.0] * len(rows)
    for phase in PHASES:
        widths = [row["phases_ms"].get(phase, 0.0) / row["batch"] for row in rows]
        axes.barh(labels, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        axes.text(left[place], place, f" {row['images_per_s']:.0f} images/s", va="center")
    axes.set_xlim(0, 1.2 * max(left, default=1.0))
    axes.set_xlabel("milliseconds per image")
    axes.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def main() -> None:
    device = default_device()
    on_cpu = device == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, DEFAULT_WORKLOADS[device])
    parser.add_argument("--providers", nargs="+", help="see benchmarks/step/providers.py")
    add_official(parser)
    parser.add_argument("--steps", type=int, default=5 if on_cpu else 30, help="timed steps of each provider")
    parser.add_argument("--warmup", type=int, default=1 if on_cpu else 5, help="steps before, besides those checked")
    parser.add_argument("--seconds", type=float, default=600 if on_cpu else 15, help="after which a timing ends")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    add_time_anyway(parser)
    options = parser.parse_args()
    if on_cpu:
        torch.set_num_threads(options.threads)
    texts = options.providers or default_providers(device, official=options.official is not None)
    open_official(options.official, texts)
    providers = [parse_provider(text, device) for text in texts]
    rows = []
    with process_group(check_device(device), start_timeout=60, hang_timeout=600) as world:
        for workload in chosen_workloads(options):
            # On CUDA each provider has the memory for itself.
            for group in [providers] if on_cpu else [[provider] for provider in providers]:
                rows += measure_steps(
                    workload, group, world, warmup=options.warmup, steps=options.steps, seconds=options.seconds,
                    time_anyway=options.time_anyway,
                )  # fmt: skip
                rows = [row | ratios(row, rows) for row in rows]
                save(options.out, "step", device, rows, plot=plot)
            done = rows[-len(providers) :]
            tables = [text_table(columns, done, num_names=2) for columns in (COLUMNS, PHASE_COLUMNS)]
            print(*tables, *problems(done), sep="\n\n", flush=True)
    if failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
