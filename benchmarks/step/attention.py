"""Attention kernels at the shapes of the models: xFormers', PyTorch's flash kernels and cuDNN's, forward and backward.

    python -m benchmarks.step.attention [--lengths 48 82 112 196 256] [--head-sizes 24 32 64 80] [--out FOLDER]

Each kernel's result is compared with attention in float32 first; one that differs is not timed. At the end the program
prints the entries of `MEASURED_CHOICES` (dmtjepa/models/attention.py): head sizes at which PyTorch's kernels are faster
over all lengths. cuDNN builds a plan for each new shape; `first ms` is the time of the first call, with the plan.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import milliseconds
from benchmarks.operators.cases import relative_error
from benchmarks.tables import add_time_anyway, number, save, text_table
from dmtjepa.models.attention import choose_attention

# Patches of the teacher (196, 256), of a context, and of a context with a target block.
LENGTHS = (48, 82, 112, 196, 256)
HEAD_SIZES = (24, 32, 64, 80)
BATCH_SIZE, NUM_HEADS = 128, 16
LIMIT = 2e-2  # relative error, in bfloat16


def in_sdpa(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of [B, L, H, E] by one kernel of PyTorch."""
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return out.transpose(1, 2)


def kernels(head_size: int) -> dict[str, Callable[..., Tensor]]:
    """The kernels by name; xFormers only where it is installed."""
    found = {
        "sdpa": choose_attention("sdpa", "cuda", head_size),
        "cudnn": functools.partial(in_sdpa, SDPBackend.CUDNN_ATTENTION),
    }
    try:
        return {"xformers": choose_attention("xformers", "cuda", head_size), **found}
    except ModuleNotFoundError:
        return found


def measure(name: str, attend: Callable[..., Tensor], inputs: list[Tensor], time_anyway: bool) -> dict:
    """The row of a kernel: error, milliseconds of the first call, of a forward pass, and of both passes."""
    row: dict = {"kernel": name, "correct": False}

    def both() -> None:
        out = attend(*leaves)
        out.backward(out.detach())

    try:
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.cuda.synchronize()
        start = time.perf_counter()
        both()
        torch.cuda.synchronize()
        row["first_ms"] = 1e3 * (time.perf_counter() - start)
        with torch.no_grad():
            expected = in_sdpa(SDPBackend.MATH, *(x.float() for x in inputs))
            row["error"] = relative_error(attend(*inputs), expected)
        row["correct"] = row["error"] <= LIMIT
        if row["correct"] or time_anyway:
            with torch.no_grad():
                row["forward_ms"] = milliseconds(lambda: attend(*inputs), "cuda")
            row["ms"] = milliseconds(both, "cuda")
    except Exception as error:  # no kernel for this shape, or none that works
        row |= {"correct": False, "problem": str(error).partition("\n")[0]}
    return row


def choices(rows: list[dict]) -> dict[int, str]:
    """`sdpa` for each head size at which its passes take 2% less time than xFormers' over all lengths, or even less."""
    found = {}
    for head_size in dict.fromkeys(row["head_size"] for row in rows):
        total = {}
        for name in ("xformers", "sdpa"):
            chosen = [row for row in rows if (row["head_size"], row["kernel"]) == (head_size, name)]
            times = [row.get("ms") if row["correct"] else None for row in chosen]
            total[name] = None if None in times or not times else sum(times)
        if total["xformers"] and total["sdpa"] and total["sdpa"] < 0.98 * total["xformers"]:
            found[head_size] = "sdpa"
    return found


COLUMNS = {
    "kernel": lambda row: row["kernel"],
    "head size": number("head_size", "{:.0f}"),
    "length": number("length", "{:.0f}"),
    "forward ms": number("forward_ms", "{:.3f}"),
    "both ms": number("ms", "{:.3f}"),
    "first ms": number("first_ms"),
    "error": number("error", "{:.0e}"),
    "": lambda row: row.get("problem", "")[:60],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help=f"sequences of {NUM_HEADS} heads")
    add_time_anyway(parser)
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: a CPU has one attention")
    torch.manual_seed(0)
    rows: list[dict] = []
    for head_size in options.head_sizes:
        for length in options.lengths:
            shape = (options.batch, length, NUM_HEADS, head_size)
            inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            for name, attend in kernels(head_size).items():
                row = {"head_size": head_size, "length": length, "batch": options.batch, "heads": NUM_HEADS}
                rows.append(row | measure(name, attend, inputs, options.time_anyway))
        save(options.out, "attention", "cuda", rows, choices=choices(rows))
    print(text_table(COLUMNS, rows, num_names=1))
    for head_size, kernel in choices(rows).items():
        print(f"MEASURED_CHOICES: ({torch.cuda.get_device_capability()}, {head_size}): {kernel!r}")
    if not all(row["correct"] for row in rows if row["kernel"] != "cudnn"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
