"""The target head, features to targets: this project against the method op for op (`dmtjepa.reference.step`).

This project calls `AggregationHead.aggregate_neighbors` on the covered patches of one step. The reference calls its
`aggregate_neighbors` on all patches and then reads the target blocks, as the official code does. Time is the median of
interleaved calls; memory is the peak of what the tensors of a call hold, without its inputs.

    python -m benchmarks.step.target_head [--workloads vit_base:8 vit_huge:16] [--official CHECKOUT] [--out FOLDER]

`--official` adds the head of the official code. Its queries come from other images when B > 1, so it is timed with its
own targets and not checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import default_device, peak_memory
from benchmarks.official import add_official, official_head, open_checkout
from benchmarks.tables import add_time_anyway, number, save, text_table
from benchmarks.workloads import OFFICIAL_WORKLOADS, Workload, add_workloads, chosen_workloads
from dmtjepa.models import AggregationHead
from dmtjepa.reference import step as reference

# Relative errors of the targets, one per patch: the median, and the share above 0.1. In bfloat16, a few patches select
# another neighbour where two are almost equally similar.
LIMITS = {torch.float32: (1e-5, 0.0), torch.bfloat16: (2e-2, 2e-2)}
DEFAULT_WORKLOADS = {"cpu": ("vit_base:8", "vit_huge:16"), "cuda": OFFICIAL_WORKLOADS}


def read_blocks(h: Tensor, target_index: Tensor) -> Tensor:
    """[B, N, D] at [B, M, T] -> [B, M, T, D], as the official step does."""
    tokens = h.gather(1, target_index.flatten(1)[..., None].expand(-1, -1, h.shape[-1]))
    return tokens.unflatten(1, target_index.shape[1:])


def measure(
    workload: Workload, device: str, dtype: torch.dtype, repeats: int, official: bool, time_anyway: bool = False
) -> list[dict]:
    """One row per provider. Wrong targets are timed only with `time_anyway`."""
    torch.manual_seed(0)
    masks = workload.masks(0, device=device)
    head = AggregationHead(workload.dim, workload.num_heads).to(device, dtype).requires_grad_(False)
    h = F.layer_norm(
        torch.randn(workload.batch_size, workload.num_patches, workload.dim, device=device), (workload.dim,)
    ).to(dtype)
    parameters = reference.parameters_of(head)

    def fast() -> Tensor:
        return head.aggregate_neighbors(h, workload.grid_size, masks.target_unique, masks.neighborhood)

    def slow() -> Tensor:
        with torch.device(device):  # the reference makes its tables there
            everywhere = reference.aggregate_neighbors(parameters, h, workload.grid_size, workload.num_heads)
        return read_blocks(everywhere, masks.target_index)

    providers = {"this project": fast, "reference": slow}
    if official:
        theirs = official_head().LocalAggHead(workload.dim, workload.num_heads, k_num=4, k_size=3)
        theirs = theirs.to(device, dtype).requires_grad_(False)
        theirs.load_state_dict(head.state_dict())
        providers["official"] = lambda: read_blocks(theirs(h, loc=True), masks.target_index)

    found, expected = (targets.flatten(0, 2).double() for targets in (fast()[masks.target_slot], slow()))
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    error, outliers = errors.median().item(), 1 - (errors <= 0.1).double().mean().item()  # a NaN is an outlier
    if not (correct := error <= LIMITS[dtype][0] and outliers <= LIMITS[dtype][1]):
        wrong = f"{workload.name}: the targets are wrong (median error {error:.1e}, {outliers:.1%} of them above 0.1)"
        if not time_anyway:
            raise SystemExit(f"{wrong}; nothing was timed")
        print(f"{wrong}; timed anyway")
    del found, expected, errors
    for provider in providers.values():
        provider()  # warm-up
    memory = {name: peak_memory(provider, device) for name, provider in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, provider in providers.items():
            start = time.perf_counter()
            provider()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name in providers:
        ms = statistics.median(times[name])
        rows.append(
            {
                **workload.description, "provider": name, "dtype": str(dtype),
                "error": error, "outliers": outliers, "correct": correct,
                "ms": ms, "peak_mib": memory[name] / 2**20,
                "time_of_reference": ms / statistics.median(times["reference"]),
                "memory_of_reference": memory[name] / memory["reference"],
            }
        )  # fmt: skip
    return rows


COLUMNS = {
    "workload": lambda row: row["workload"],
    "provider": lambda row: row["provider"],
    "ms": number("ms", "{:.2f}"),
    "speed": lambda row: f"{1 / row['time_of_reference']:.2f}x",
    "peak MiB": number("peak_mib"),
    "memory": number("memory_of_reference", "{:.2f}x"),
}


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, DEFAULT_WORKLOADS[device])
    parser.add_argument("--repeats", type=int, default=30 if device == "cuda" else 9)
    add_official(parser)
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    add_time_anyway(parser)
    options = parser.parse_args()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if options.official:
        open_checkout(options.official)
    rows = []
    for workload in chosen_workloads(options):
        with torch.inference_mode():
            rows += measure(workload, device, dtype, options.repeats, options.official is not None, options.time_anyway)
        save(options.out, "targets", device, rows)
    print(text_table(COLUMNS, rows, num_names=2))
    if not all(row["correct"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
