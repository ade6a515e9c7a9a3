"""What every operator benchmark shares: shapes, the correctness gate, timing, the table and the JSON file.

A benchmark module defines `cases(shape, device, dtype)`; a case is one operator call with its arguments, its
implementations, a reference, and the bytes it must move: every input element that is needed read once, every output
element written once. Timed are the Triton kernels and plain PyTorch, eager and compiled, on a GPU; without one the CPU
implementation and plain PyTorch. Nothing is timed unless its result agrees with the reference.

    python -m benchmarks.bench_gather_tokens [--shapes base huge] [--dtype bfloat16] [--out FOLDER]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from dmtjepa.config import MaskSettings
from dmtjepa.masking import MaskBatch, sample_masks


@dataclass(frozen=True)
class Shape:
    """A model of the published configurations, at its batch per device."""

    name: str
    dim: int
    num_heads: int
    patch_size: int
    batch_size: int
    image_size: int = 224

    @property
    def grid_size(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @cache  # noqa: B019  five shapes live as long as the program
    def masks(self) -> MaskBatch:
        """The masks of one step of the released sampler."""
        return sample_masks(MaskSettings(), self.grid_size, self.batch_size, seed=0, step=0, rank=0)

    @property
    def name_and_batch(self) -> str:
        return f"{self.name} B={self.batch_size}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("base", dim=768, num_heads=12, patch_size=16, batch_size=256),
        Shape("large", dim=1024, num_heads=16, patch_size=16, batch_size=256),
        Shape("huge", dim=1280, num_heads=16, patch_size=14, batch_size=128),
        Shape("giant", dim=1408, num_heads=16, patch_size=16, batch_size=128),
    )
}


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||; NaN where the output has a NaN."""
    output, reference = output.double(), reference.double()
    return float((output - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass
class Case:
    """One call of an operator, `launch(*arguments)`, and what it is compared with, called alike.

    Every result is compared with that of `reference` by `error(output, reference)`, which must stay below `limit`.
    """

    name: str
    arguments: tuple
    launch: Callable
    cpu: Callable
    plain: Callable
    reference: Callable
    unique_bytes: int
    limit: float
    error: Callable[[object, object], float] = relative_error

    def providers(self, device: str) -> dict[str, Callable]:
        """The implementations to compare on a device."""
        if device == "cpu":
            return {"cpu": self.cpu, "eager": self.plain}
        # dynamic=False: the best code torch.compile has for exactly this shape.
        compiled = torch.compile(self.plain, fullgraph=True, dynamic=False)
        return {"triton": self.launch, "eager": self.plain, "compile": compiled}


def rounding(dtype: torch.dtype) -> float:
    """A relative error well above the dtype's rounding and well below a mistake."""
    return 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, the L2 cache emptied before each on a GPU."""
    if device == "cuda":
        return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")
    function()
    times = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 30):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@cache
def copy_bandwidth(device: str) -> float:
    """Measured bytes per second of a large copy, read plus written: the ceiling of a memory-bound kernel."""
    source = torch.ones(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), device))


def measure(case: Case, device: str) -> list[dict]:
    """One row per provider. A provider that fails the gate has an error and no time."""
    reference = case.reference(*case.arguments)
    rows = []
    for name, provider in case.providers(device).items():
        error = case.error(provider(*case.arguments), reference)
        row = {"operator": case.name, "provider": name, "error": error, "limit": case.limit}
        row["correct"] = error <= case.limit  # False for a NaN
        if row["correct"]:
            row["ms"] = milliseconds(lambda provider=provider: provider(*case.arguments), device)
            row["gb_per_s"] = case.unique_bytes / row["ms"] / 1e6
            row["of_copy"] = 1e9 * row["gb_per_s"] / copy_bandwidth(device)
        rows.append(row)
    times = {row["provider"]: row["ms"] for row in rows if row["correct"]}
    for row in rows:
        row["unique_bytes"] = case.unique_bytes
        if row["correct"]:
            row["speed_vs"] = {name: times[name] / row["ms"] for name in ("eager", "compile") if name in times}
    return rows


def environment(device: str) -> dict:
    """Hardware, versions and commit, for every file of results."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "hardware": hardware,
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "driver": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} threads)"


def table(rows: Iterable[dict]) -> str:
    """The rows as text, one line each."""
    titles = f"{'ms':>9}{'GB/s':>8}{'of copy':>9}{'vs eager':>10}{'vs compile':>12}"
    lines = [f"{'operator':<28}{'shape':<14}{'provider':<10}{titles}"]
    for row in rows:
        start = f"{row['operator']:<28}{row['shape']:<14}{row['provider']:<10}"
        if row["correct"]:
            ratios = [
                f"{row['speed_vs'][name]:.2f}x" if name in row["speed_vs"] else "-" for name in ("eager", "compile")
            ]
            numbers = f"{row['ms']:>9.3f}{row['gb_per_s']:>8.0f}{row['of_copy']:>9.0%}{ratios[0]:>10}{ratios[1]:>12}"
            lines.append(start + numbers)
        else:
            lines.append(f"{start}  WRONG: error {row['error']:.2e} above {row['limit']:.2e}, not timed")
    return "\n".join(lines)


def main(cases: Callable[[Shape, str, torch.dtype], list[Case]], description: str) -> None:
    """The command line of an operator benchmark. Exits with 1 if a provider failed the gate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES) if device == "cuda" else ["base"])
    parser.add_argument("--batch", type=int, help="images per device instead of the published number")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    options = parser.parse_args()

    if device == "cpu":
        print("No CUDA device: these are times of the CPU implementations and say nothing about the Triton kernels.")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    torch.manual_seed(0)
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        batch = options.batch or (shape.batch_size if device == "cuda" else 8)
        shape = Shape(shape.name, shape.dim, shape.num_heads, shape.patch_size, batch)
        for case in cases(shape, device, dtype):
            rows += [{"shape": shape.name_and_batch, "dtype": str(dtype), **row} for row in measure(case, device)]
    print(f"copy: {copy_bandwidth(device) / 1e9:.0f} GB/s\n{table(rows)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        operator = rows[0]["operator"].split()[0]
        document = {**environment(device), "copy_gb_per_s": copy_bandwidth(device) / 1e9, "rows": rows}
        (options.out / f"{operator}.json").write_text(json.dumps(document, indent=1))
    if not all(row["correct"] for row in rows):
        raise SystemExit(1)
