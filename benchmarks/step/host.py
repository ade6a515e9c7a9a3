"""Time that the host needs to enqueue a training step, and how many launches it enqueues.

    python -m benchmarks.step.host [--workloads vit_base:256 vit_huge:128] [--providers project] [--out FOLDER]
    python -m tools.fake_cuda python -m benchmarks.step.host    # on a machine without a GPU
    ... --workloads vit_small:64 --providers project project:fused project:fused:graphs    # steps as CUDA graphs

A step cannot be faster than this, however fast the GPU is. The time is the processor time of all threads of the process
(backward passes run in a thread of their own). It starts when the device is idle and does not include waiting for the
enqueued work. Masks differ from step to step, as in a run; a provider with
graphs makes each step once before it is timed, so that its shape has been captured. Providers are described in
benchmarks/step/providers.py.

Under fake CUDA (tools/fake_cuda) kernels cost nothing and PyTorch's own code is real, so that the time is the host's
alone, of this machine's processor; there also counted are launches (kernels, products, copies, collectives and
graphs) and waits, the calls in which the host would have waited for the device. On a GPU the time is the same, and
includes waiting for room where a step enqueues more than the 1000 or so launches that fit into a stream.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import torch

from benchmarks.official import add_official
from benchmarks.step.providers import Provider, open_official, parse_provider
from benchmarks.step.runs import Run, failed, failures_noted, problems
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import Workload, add_workloads, chosen_workloads
from dmtjepa.devices import check_device, release_memory
from dmtjepa.training.distributed import World, process_group


def count_calls() -> dict[str, int]:
    """Launches and waits of this process so far, under fake CUDA, which counts them."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "fake_cuda_launches"):
        return {}
    return {"launches": library.fake_cuda_launches(), "waits": library.fake_cuda_synchronizations()}


def measure(workload: Workload, provider: Provider, world: World, warmup: int, steps: int) -> dict:
    """The row of a provider: median and least time of a step, calls per step, graphs that were compiled."""
    row: dict = {**workload.description, "provider": provider.name}
    with failures_noted(row):
        start = time.perf_counter()
        run = Run(workload, provider, world)
        for step in range(warmup):
            run(step)
        run.prepare_steps(range(warmup, warmup + steps))
        row["start_seconds"] = time.perf_counter() - start
        seconds, calls = [], []
        for step in range(warmup, warmup + steps):
            masks = run.masks(step)
            torch.cuda.synchronize()
            before, started = count_calls(), time.process_time()
            run.step(run.images, masks, step)
            seconds.append(time.process_time() - started)
            calls.append({name: count - before[name] for name, count in count_calls().items()})
        row |= {"steps": steps, "ms": 1e3 * statistics.median(seconds), "ms_least": 1e3 * min(seconds)}
        row |= {name: statistics.median(count[name] for count in calls) for name in calls[0]}
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run = None
    torch._dynamo.utils.counters.clear()
    release_memory(world.device)
    return row


COLUMNS = {
    "workload": lambda row: row["workload"],
    "provider": lambda row: row["provider"],
    "ms": number("ms"),
    "least": number("ms_least"),
    "launches": number("launches", "{:.0f}"),
    "waits": number("waits", "{:.0f}"),
    "graphs": number("graphs", "{:.0f}"),
    "start s": number("start_seconds", "{:.0f}"),
}


def plot(axes, rows: list[dict]) -> None:
    """Milliseconds of each provider."""
    rows = [row for row in rows if "ms" in row][::-1]
    axes.barh([f"{row['workload']}, {row['provider']}" for row in rows], [row["ms"] for row in rows])
    axes.set_xlabel("milliseconds of the host per step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, ["vit_base:256", "vit_huge:128"])
    parser.add_argument("--providers", nargs="+", default=["project"], help="see benchmarks/step/providers.py")
    add_official(parser)
    parser.add_argument("--steps", type=int, default=24, help="timed steps")
    parser.add_argument("--warmup", type=int, default=12, help="steps before")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or: python -m tools.fake_cuda python -m benchmarks.step.host ...")
    open_official(options.official, options.providers)
    providers = [parse_provider(text, "cuda") for text in options.providers]
    workloads = chosen_workloads(options)
    rows = []
    with process_group(check_device("cuda"), start_timeout=60, hang_timeout=600) as world:
        for workload in workloads:
            for provider in providers:
                rows.append(measure(workload, provider, world, options.warmup, options.steps))
                save(options.out, "host", "cuda", rows, plot=plot)
    print(text_table(COLUMNS, rows, num_names=2), *problems(rows), sep="\n\n")
    if failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
