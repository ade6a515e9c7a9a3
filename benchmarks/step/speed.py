"""The whole training step: this project, its reference and the published code over the same masks.

    python -m benchmarks.step.speed [--models vit_huge:128 vit_base:256] [--published CHECKOUT] [--out FOLDER]
    python -m benchmarks.step.speed --providers project:bfloat16:compiled:sdpa project:float32:eager reference

A step is targets, head, predictions, loss, backward, update (gradient norm, AdamW) and teacher (its average);
providers are described in benchmarks/step/providers.py. Printed are the median and the 95th percentile of the steps,
images/s and MFU at the median, the peak of the memory, and the median of each phase.

- Checked first: loss and gradient norm of the first steps against the reference in float32. A provider that differs is
  not timed, and the program exits with 1. (The published code is checked at B = 1 and by its loss alone: for B > 1 its
  queries come from other images.)
- MFU counts the FLOPs of the lean step (`dmtjepa.training.estimate.step_flops`) at the shapes of the masks of each
  step, for every provider alike; the peak is the data sheet's on A100, H100 and H200 in bfloat16, and else that of a
  measured product of square matrices.
- Memory is `held` (weights, averages, moments) and `peak` (held plus what a step adds at its worst), of the step with
  the most work. On a CPU it is counted from PyTorch's allocations (without the buckets of the published code's
  DistributedDataParallel), on CUDA it is what the allocator reports.
- On a CPU the providers take each step in turn. Phases are timed by marks in the stream: nothing waits between steps,
  except where the provider itself does. The reference counts its head into `targets`.
- Waiting for data is not part of it: the trainer's log and `benchmarks.data.loader` have that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.machine import GIB, default_device
from benchmarks.step.providers import PHASES, open_published, parse_provider, parse_workload
from benchmarks.step.runs import failed, measure_steps, problems, ratios
from benchmarks.tables import number, save, text_table
from dmtjepa.training.distributed import check_device, process_group

DEFAULT_MODELS = {"cpu": ["vit_small:16"], "cuda": ["vit_huge:128", "vit_large:256", "vit_base:256"]}


def default_providers(device: str, published: bool) -> list[str]:
    """All but the published code where no checkout of it is at hand."""
    if device == "cpu":
        found = ["reference:float32", "project:float32:eager", "project:float32:compiled", "project:bfloat16:compiled"]
        return ["published:float32"] * published + found
    fp8 = ["project:fp8"] * (torch.cuda.get_device_capability() >= (9, 0))
    # What the goals are measured against comes first: a program that is stopped has compared.
    return ["published", "project", *fp8, "reference"] if published else ["project", "reference", *fp8]


COLUMNS = {
    "model": lambda row: row["model"],
    "provider": lambda row: row["provider"],
    "images/s": number("images_per_s"),
    "ms": number("ms"),
    "p95": number("ms_p95"),
    "MFU": number("mfu", "{:.1%}"),
    "held GiB": number("held_bytes", "{:.2f}", 1 / GIB),
    "peak GiB": number("peak_bytes", "{:.2f}", 1 / GIB),
    "vs published": number("speed_vs_published", "{:.2f}x"),
    "memory": number("memory_vs_published", "{:.2f}x"),
    "vs reference": number("speed_vs_reference", "{:.2f}x"),
    "error": number("error_first", "{:.0e}"),
    "later": number("error_later", "{:.0e}"),
}
PHASE_COLUMNS = {
    "model": lambda row: row["model"],
    "ms of": lambda row: row["provider"],
    **{phase: (lambda row, phase=phase: number(phase)(row.get("phases_ms", {}))) for phase in PHASES},
}


def plot(axes, rows: list[dict]) -> None:
    """Milliseconds per image of each provider, divided into phases."""
    rows = [row for row in rows if "phases_ms" in row][::-1]
    labels = [f"{row['model']}, {row['provider']}" for row in rows]
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
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS[device], help="model:batch, e.g. vit_huge:128")
    parser.add_argument("--set", nargs="+", default=[], help="settings, e.g. data.crop_size=96 mask.min_keep=2")
    parser.add_argument("--providers", nargs="+", help="see benchmarks/step/providers.py")
    parser.add_argument("--published", type=Path, help="a checkout of the published code")
    parser.add_argument("--steps", type=int, default=5 if on_cpu else 30, help="timed steps of each provider")
    parser.add_argument("--warmup", type=int, default=1 if on_cpu else 5, help="steps before, besides those checked")
    parser.add_argument("--seconds", type=float, default=600 if on_cpu else 15, help="after which a timing ends")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    options = parser.parse_args()
    if on_cpu:
        torch.set_num_threads(options.threads)
    texts = options.providers or default_providers(device, published=options.published is not None)
    open_published(options.published, texts)
    providers = [parse_provider(text, device) for text in texts]
    rows = []
    with process_group(check_device(device), start_timeout=60, hang_timeout=600) as world:
        for text in options.models:
            workload = parse_workload(text, options.set)
            # On CUDA each provider has the memory for itself.
            for group in [providers] if on_cpu else [[provider] for provider in providers]:
                rows += measure_steps(
                    workload, group, world, warmup=options.warmup, steps=options.steps, seconds=options.seconds
                )
                rows = [row | ratios(row, rows) for row in rows]
                save(options.out, "step", device, rows, plot=plot)
            done = rows[-len(providers) :]
            tables = [text_table(columns, done, num_names=2) for columns in (COLUMNS, PHASE_COLUMNS)]
            print(*tables, *problems(done), sep="\n\n", flush=True)
    if failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
