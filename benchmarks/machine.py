"""The machine that runs a benchmark: its description, its clocks, and the rates that it reaches at best."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path

import torch
import triton

GIB = 2**30
CLOCK_RATE = 2e9  # cycles per second; no GPU that is measured here has a faster clock
# Dense bfloat16 products on tensor cores, FLOP/s, from NVIDIA's data sheets (SXM modules).
PEAK_BFLOAT16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment(device: str) -> dict:
    """Hardware, versions, commit and command, for every file of results.

    The commit is that of the variable GIT_COMMIT, for files that were copied to another machine, or else that of the
    repository.
    """
    root = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        """What git prints; None where there is no git, or no repository."""
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = None if os.environ.get("GIT_COMMIT") else git("status", "--porcelain")

    return {
        "command": portable_command(["python", *sys.orig_argv[1:]]),
        "date": str(date.today()),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "processor": _processor(),
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("GIT_COMMIT") or git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def portable_command(arguments: Sequence[str]) -> str:
    """A command without the folders of the machine it ran on."""
    return " ".join(os.path.basename(text) if os.path.isabs(text) else text for text in arguments)


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
    lines that have yet to be written back, up to 16 microseconds of them. Then the GPU waits until the host has
    enqueued the whole call, so that no gap between its kernels is counted.
    """
    other = torch.zeros(2**28, dtype=torch.uint8, device="cuda").view(torch.int32)
    lead = _enqueuing_cycles(function)
    spans = []
    waited = time.perf_counter()
    while len(spans) < 10 or (len(spans) < most and 1e3 * (time.perf_counter() - waited) < budget_ms):
        other.sum()
        torch.cuda._sleep(lead)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        spans.append((begin, end))
        if len(spans) % 10 == 0:
            end.synchronize()  # what is measured, not what is queued, uses up the budget
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans[5:])


def _enqueuing_cycles(function: Callable[[], object]) -> int:
    """Cycles of a GPU in twice the time that the host needs to enqueue a call, the median of three."""
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return int(2 * statistics.median(seconds) * CLOCK_RATE)


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
