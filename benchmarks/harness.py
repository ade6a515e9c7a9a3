"""What the benchmarks share: a description of the machine and its ceilings, peak memory, tables, files and plots.

The second half runs the benchmarks of operators. Such a module defines `cases(shape, device, dtype)`; a case is one
operator call with its arguments, its implementations, a reference, and the bytes it must move: every input element that
is needed read once, every output element written once. Timed are the Triton kernels and plain PyTorch, eager and
compiled, on a GPU; without one the CPU implementation and plain PyTorch. Nothing is timed unless its result agrees with
the reference.

    python -m benchmarks.bench_gather_tokens [--shapes base huge] [--dtype bfloat16] [--out FOLDER]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskBatch, sample_masks

GIB = 2**30
# Dense bfloat16 products on tensor cores, FLOP/s, from NVIDIA's data sheets (SXM modules).
PEAK_BFLOAT16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- The machine and its ceilings


def environment(device: str) -> dict:
    """Hardware, versions, commit and command, for every file of results.

    The commit is that of the repository, or of the variable GIT_COMMIT where the files are there without it.
    """
    root = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        """What git prints; None where there is no git, or no repository."""
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")

    return {
        "command": " ".join(["python", *(os.path.basename(a) if os.path.isabs(a) else a for a in sys.orig_argv[1:])]),
        "date": str(date.today()),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "processor": _processor(),
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git("rev-parse", "HEAD") or os.environ.get("GIT_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} threads)"


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, the L2 cache emptied before each on a GPU."""
    function()
    if device == "cuda":
        return _gpu_milliseconds(function)
    times = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 30):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _gpu_milliseconds(function: Callable[[], object], most: int = 200, budget_ms: float = 250.0) -> float:
    """As above; the first 5 calls are not counted.

    The cache is emptied by reading: after writing (as `triton.testing.do_bench` does) the call would also pay for the
    lines that have yet to be written back, up to 16 microseconds of them.
    """
    other = torch.zeros(2**28, dtype=torch.uint8, device="cuda").view(torch.int32)
    spans = []
    waited = time.perf_counter()
    while len(spans) < 10 or (len(spans) < most and 1e3 * (time.perf_counter() - waited) < budget_ms):
        other.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        spans.append((begin, end))
        if len(spans) % 10 == 0:
            end.synchronize()  # what is measured, not what is queued, uses up the budget
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans[5:])


@cache
def copy_bandwidth(device: str) -> float:
    """Measured bytes per second of a large copy, read plus written: the ceiling of a memory-bound kernel."""
    source = torch.ones(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), device))


@cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a product of two square matrices: the ceiling of a compute-bound kernel."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * milliseconds(lambda: a @ b, device))


def peak_rate(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that an MFU refers to, and where the number is from: a data sheet if there is one, else measured."""
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for known, rate in PEAK_BFLOAT16.items():
            if known in name:
                return rate, f"{known}, data sheet"
    return product_rate(device, dtype), "measured product of square matrices"


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that a call's tensors hold at their peak, on top of what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    # Allocations and releases of tensors in their order; the resident set would also count what malloc keeps.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- Tables, files, plots


def text_table(columns: dict[str, Callable[[dict], str]], rows: Sequence[dict], num_names: int) -> str:
    """One line per row; the first `num_names` columns are names, aligned left."""
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def join(line: list[str]) -> str:
        names = (cell.ljust(width) for cell, width in zip(line[:num_names], widths, strict=False))
        numbers = (cell.rjust(width) for cell, width in zip(line[num_names:], widths[num_names:], strict=True))
        return "  ".join([*names, *numbers]).rstrip()

    return "\n".join(map(join, lines))


def number(key: str, text: str = "{:.1f}", scale: float = 1.0) -> Callable[[dict], str]:
    """A column of a table: `row[key] * scale`, or a dash where the row has no such value."""
    return lambda row: "-" if row.get(key) is None else text.format(row[key] * scale)


def save(out: Path | None, name: str, device: str, rows: list[dict], *, plot: Callable | None = None, **more) -> None:
    """Write `<hardware>-<date>-<name>.json` into the folder `out`, and what `plot(axes, rows)` draws as .png beside it.

    Does nothing without a folder.
    """
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
    path = out / f"{hardware}-{date.today()}-{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**environment(device), **more, "rows": rows}, indent=1) + "\n")
    unfinished.replace(path)  # a program that is stopped leaves whole files
    if plot is None:
        return
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1 + 0.35 * min(25, max(8, len(rows)))), layout="constrained")
        plot(figure.add_subplot(), rows)
        figure.savefig(path.with_suffix(".png"), dpi=120)
    except Exception:  # the results are written: a benchmark must not end for its picture
        traceback.print_exc()


# ---- Operators


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

    def provider(self, name: str) -> Callable:
        """One implementation: `triton`, `cpu`, `eager` or `compile`."""
        if name == "compile":  # dynamic=False: the best code torch.compile has for exactly this shape
            return torch.compile(self.plain, fullgraph=True, dynamic=False)
        return {"triton": self.launch, "cpu": self.cpu, "eager": self.plain}[name]


def rounding(dtype: torch.dtype) -> float:
    """A relative error well above the dtype's rounding and well below a mistake."""
    return 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def measure(case: Case, name: str, reference: object, device: str) -> dict:
    """The row of one provider. One that fails, or fails the gate, has an error and no time."""
    row = {"operator": case.name, "provider": name, "unique_bytes": case.unique_bytes, "correct": False}
    try:
        provider = case.provider(name)
        row |= {"error": case.error(provider(*case.arguments), reference), "limit": case.limit}
        if not row["error"] <= case.limit:  # a NaN, too
            return row | {"problem": f"WRONG: error {row['error']:.2e} above {case.limit:.2e}, not timed"}
        row["ms"] = milliseconds(lambda: provider(*case.arguments), device)
    except Exception as error:
        traceback.print_exc()
        return row | {"problem": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    gb_per_s = case.unique_bytes / row["ms"] / 1e6
    return row | {"gb_per_s": gb_per_s, "of_copy": 1e9 * gb_per_s / copy_bandwidth(device), "correct": True}


def with_speeds(rows: list[dict]) -> list[dict]:
    """The rows in the order of their operators, each with its speed against eager and compiled PyTorch."""
    times = {(row["shape"], row["operator"], row["provider"]): row["ms"] for row in rows if "ms" in row}
    order = {(row["shape"], row["operator"]): place for place, row in reversed(list(enumerate(rows)))}
    found = []
    for row in sorted(rows, key=lambda row: order[row["shape"], row["operator"]]):
        theirs = {name: times.get((row["shape"], row["operator"], name)) for name in ("eager", "compile")}
        speeds = {name: ms / row["ms"] for name, ms in theirs.items() if ms and "ms" in row}
        found.append(row | {"speed_vs": speeds})
    return found


OPERATOR_COLUMNS = {
    "operator": lambda row: row["operator"],
    "shape": lambda row: row["shape"],
    "provider": lambda row: row["provider"],
    "ms": number("ms", "{:.3f}"),
    "GB/s": number("gb_per_s", "{:.0f}"),
    "of copy": number("of_copy", "{:.0%}"),
    "vs eager": lambda row: number("eager", "{:.2f}x")(row.get("speed_vs", {})),
    "vs compile": lambda row: number("compile", "{:.2f}x")(row.get("speed_vs", {})),
    "": lambda row: row.get("problem", ""),
}


def plot_operators(axes, rows: list[dict]) -> None:
    """Each provider's share of the copy bandwidth."""
    rows = [row for row in rows if row["correct"]][::-1]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["provider"] for row in rows))}
    labels = [f"{row['operator']}, {row['shape']}, {row['provider']}" for row in rows]
    axes.barh(labels, [row["of_copy"] for row in rows], color=[colors[row["provider"]] for row in rows])
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("unique bytes per second over the bandwidth of a copy")


def main(description: str, name: str, *operators: Callable[[Shape, str, torch.dtype], list[Case]]) -> None:
    """The command line of a benchmark of operators, each given as its `cases`. Exits with 1 if one failed the gate."""
    device = default_device()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES) if device == "cuda" else ["base"])
    parser.add_argument("--batch", type=int, help="images per device instead of the published number")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results and a plot")
    options = parser.parse_args()

    if device == "cpu":
        print("No CUDA device: these are times of the CPU implementations and say nothing about the Triton kernels.")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    torch.manual_seed(0)
    gb_per_s = copy_bandwidth(device) / 1e9
    rows = []
    for shape in (SHAPES[shape] for shape in options.shapes):
        shape = replace(shape, batch_size=options.batch or (shape.batch_size if device == "cuda" else 8))
        drawn = [(case, case.reference(*case.arguments)) for make in operators for case in make(shape, device, dtype)]
        # What torch.compile makes comes last: it takes minutes, and the rest is worth having without it.
        for names in (("triton", "eager"), ("compile",)) if device == "cuda" else (("cpu", "eager"),):
            for case, reference in drawn:
                for provider in names:
                    row = measure(case, provider, reference, device)
                    rows.append({"shape": shape.name_and_batch, "dtype": str(dtype), **row})
                rows = with_speeds(rows)
                save(options.out, name, device, rows, copy_gb_per_s=gb_per_s)
    print(f"copy: {gb_per_s:.0f} GB/s\n{text_table(OPERATOR_COLUMNS, rows, num_names=3)}")
    save(options.out, name, device, rows, plot=plot_operators, copy_gb_per_s=gb_per_s)
    if not all(row["correct"] for row in rows if row["provider"] != "compile"):
        raise SystemExit(1)
