"""Runs of whole training steps: how they are checked and timed, and how their memory is measured.

The steps themselves are in `benchmarks.step.providers`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import peak_memory, peak_rate
from benchmarks.step.providers import PHASES, Provider, ReferenceStep, build_step, draw_model
from benchmarks.workloads import Workload
from dmtjepa.devices import release_memory
from dmtjepa.masks import MaskBatch
from dmtjepa.reference import step as reference
from dmtjepa.tensors import local_tensors
from dmtjepa.training.distributed import World
from dmtjepa.training.stopwatch import Stopwatch

# ---- The gate: losses and gradient norms of the first steps must agree with those of the reference in float32.

CHECKED_STEPS = 3
# Largest relative error of the first step, and of those after an update.
LIMITS = {"float32": (1e-5, 1e-3), "bfloat16": (5e-3, 3e-2), "fp8": (2e-2, 5e-2)}


class Run:
    """A provider on a workload. Its steps are timed phase by phase, without a wait between them."""

    def __init__(self, workload: Workload, provider: Provider, world: World) -> None:
        self.workload, self.provider, self.world = workload, provider, world
        self.clock = Stopwatch(world.device)
        self.events: list[tuple[str, object]] = []  # phases of the current step and the events at their start
        self.timed_steps: list[int] = []
        self.timed_events: list[list[tuple[str, object]]] = []
        self.memory_before = allocated(world.device)
        self.step = build_step(workload, provider, world, self.record_phase)
        self.images = self.prepare(workload)

    def record_phase(self, phase: str) -> None:
        self.events.append((str(phase), self.clock.record_event()))

    def prepare(self, workload: Workload) -> Tensor:
        """The images in the form that the provider takes."""
        images = workload.images(self.world.device, self.world.rank)
        if not self.step.takes_pixels:
            return images
        with self.world.device:
            return reference.normalize_pixels(images, torch.float32)

    def prepare_steps(self, steps: Iterable[int]) -> None:
        """Make the masks of steps, and the steps themselves where the provider captures each shape of masks first."""
        for step in steps:
            self.masks(step)
            if "graphs" in self.provider.properties:
                self(step)

    def __call__(self, step: int, workload: Workload | None = None) -> tuple[float, float | None]:
        """Make a step and wait for it; returns loss and gradient norm. The gate gives another workload."""
        images = self.images if workload is None else self.prepare(workload)
        loss, norm = self.step(images, self.masks(step, workload), step)
        return float(loss), None if norm is None else float(norm)

    def time(self, step: int) -> None:
        """Make a step and keep the events of its phases."""
        masks = self.masks(step)
        self.events = []
        self.record_phase("begin")
        self.step(self.images, masks, step)
        self.timed_steps.append(step)
        self.record_phase("end")
        self.timed_events.append(self.events)

    def masks(self, step: int, workload: Workload | None = None) -> MaskBatch:
        """The masks of a step on the device; they stay there."""
        world = self.world
        return (workload or self.workload).masks(step, world.rank, world.world_size, world.device)

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each timed step: the whole (`step`) and each phase."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        found = []
        for events in self.timed_events:
            phases = {"step": self.clock.seconds(events[0][1], events[-1][1])}
            for (phase, start), (_, end) in itertools.pairwise(events):
                phases[phase] = phases.get(phase, 0.0) + self.clock.seconds(start, end)
            found.append(phases)
        return found

    def held_bytes(self) -> int:
        """Bytes of weights, averages and moments between two steps; on CUDA, all bytes allocated for this run."""
        if self.world.device.type == "cuda":
            return allocated(self.world.device) - self.memory_before
        modules = self.step.modules()
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += [t for state in self.step.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local_tensors(tensors)}
        return sum(storages.values())

    def measure_memory(self, step: int) -> dict[str, float]:
        """Peak of a step in bytes: what is held before it, what it adds, and the sum."""
        held = self.held_bytes()
        transient = peak_memory(lambda: self(step), self.world.device.type)
        return {"held_bytes": held, "transient_bytes": transient, "peak_bytes": held + transient}


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@cache
def reference_values(workload: Workload, device: torch.device) -> list[tuple[float, float]]:
    """Loss and gradient norm of the reference's first steps, in float32."""
    model = draw_model(workload.config(), device)
    step = ReferenceStep(model, device, lambda phase: None, torch.float32, micro_batch_size=16)
    with device:
        pixels = reference.normalize_pixels(workload.images(device), torch.float32)
    masks = (workload.masks(number, device=device) for number in range(CHECKED_STEPS))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its convolution embeds the patches
        found = [tuple(map(float, step(pixels, mask, number))) for number, mask in enumerate(masks)]
    del model, step
    release_memory(device)
    return found


def check(run: Run) -> dict:
    """Make the first steps and compare them with those of the reference.

    The official code takes its queries from other images when B > 1, so its first steps have one image.

    Returns:
        The largest relative errors of loss and gradient norm (inf where not finite) of the first step, `error_first`,
        and of the others, `error_later`; their limits; whether they are within them, `correct`.
    """
    workload = replace(run.workload, batch_size=1) if run.provider.code == "official" else run.workload
    errors = []
    for step, expected in enumerate(reference_values(workload, run.world.device)):
        found = run(step, workload if workload != run.workload else None)
        errors.append(max(_relative(a, b) for a, b in zip(found, expected, strict=True) if a is not None))
    limits = LIMITS[run.provider.rounding]
    first, later = errors[0], max(errors[1:])
    return {
        "checked_batch": workload.batch_size,
        "error_first": first, "error_later": later, "limit_first": limits[0], "limit_later": limits[1],
        "correct": first <= limits[0] and later <= limits[1],
    }  # fmt: skip


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected and math.isfinite(found) else math.inf


@contextlib.contextmanager
def failures_noted(row: dict) -> Iterator[None]:
    """Write the error of a provider that fails, for lack of memory or otherwise, into its row."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        row["error"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        row["correct"] = False


def measure_steps(
    workload: Workload,
    providers: list[Provider],
    world: World,
    *,
    warmup: int,
    steps: int,
    seconds: float,
    time_anyway: bool = False,
) -> list[dict]:
    """Check and time providers on a workload, and measure their memory.

    Each provider is checked and makes `warmup` further steps. Then all providers make each of the `steps` in turn, so
    that a drift of the machine affects all alike; the timing ends when `seconds` per provider have passed, but not
    before 3 steps. Last, the memory of the step with the most work is measured. A provider that differs from the
    reference is timed only with `time_anyway`.

    Returns:
        One row per provider.
    """
    first = CHECKED_STEPS + warmup
    numbers = range(first, first + steps)
    reference_values(workload, world.device)  # an error of the reference ends the program
    rows, runs = [], []
    for provider in providers:
        row: dict = {**workload.description, "provider": provider.name}
        rows.append(row)
        start = time.perf_counter()
        with failures_noted(row):
            run = Run(workload, provider, world)
            row |= check(run)
            if row["correct"] or time_anyway:
                for number in range(CHECKED_STEPS, first):
                    run(number)
                run.prepare_steps(numbers)
                runs.append((run, row))
        row["start_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    for count, number in enumerate(numbers):
        if count >= 3 and time.perf_counter() - start > seconds * len(providers):
            break
        for run, row in runs:
            if "error" not in row:
                with failures_noted(row):
                    run.time(number)
    for run, row in runs:
        if len(run.timed_steps) >= 3:  # also of one that failed later, for lack of memory at larger masks
            with failures_noted(row):
                row |= summarize(workload, run.provider, world.device.type, run.timed_steps, run.seconds())
        if "error" not in row:
            with failures_noted(row):
                row |= run.measure_memory(max(numbers, key=workload.flops))
    run = None
    runs.clear()
    release_memory(world.device)
    return rows


def summarize(
    workload: Workload, provider: Provider, device: str, steps: list[int], seconds: list[dict[str, float]]
) -> dict:
    """Median and 95th percentile of steps, images/s and MFU at the median, and the median of each phase."""
    times = [phases["step"] for phases in seconds]
    rates = [workload.flops(step) / time for step, time in zip(steps, times, strict=True)]
    peak, source = peak_rate(device, provider.dtype)
    phases = {name: [phases[name] for phases in seconds if name in phases] for name in PHASES}
    return {
        "steps": len(times),
        "ms": 1e3 * statistics.median(times),
        "ms_p95": 1e3 * float(np.percentile(times, 95)),
        "images_per_s": workload.batch_size / statistics.median(times),
        "lean_gflop_per_image": statistics.mean(map(workload.flops, steps)) / workload.batch_size / 1e9,
        "mfu": statistics.median(rates) / peak,
        "peak_tflop_per_s": peak / 1e12,
        "peak_source": source,
        "phases_ms": {name: 1e3 * statistics.median(values) for name, values in phases.items() if values},
    }


def ratios(row: dict, rows: list[dict]) -> dict:
    """Speed and peak memory of a row against the official code and the reference on the same workload."""
    found = {}
    alike = [other for other in rows if other["workload"] == row["workload"]]
    for code in ("official", "reference"):
        other = next((other for other in alike if other["provider"].startswith(code)), {})
        if "ms" in other and "ms" in row:
            found[f"speed_vs_{code}"] = other["ms"] / row["ms"]
        if "peak_bytes" in other and "peak_bytes" in row:
            found[f"memory_vs_{code}"] = row["peak_bytes"] / other["peak_bytes"]
    return found


def failed(rows: list[dict]) -> bool:
    """Whether a provider was wrong or failed; lack of memory is a result."""
    return any(row.get("correct") is False for row in rows)


def problems(rows: list[dict]) -> list[str]:
    """The reasons why rows have no times, or times of wrong results."""
    found = []
    for row in rows:
        if "error" in row:
            found.append(f"{row['workload']}, {row['provider']}: {row['error']}")
        elif row.get("correct") is False:
            first, later = (f"{row[f'error_{x}']:.1e} (limit {row[f'limit_{x}']:.0e})" for x in ("first", "later"))
            timed = "timed anyway" if "ms" in row else "not timed"
            found.append(f"{row['workload']}, {row['provider']}: WRONG, {timed}: error {first}, after updates {later}")
    return found
