"""Where the time of a training step goes: a trace, and a table of the operators that take most of it.

    python -m benchmarks.step.profile [--workload vit_huge:128] [--provider project] [--steps 3] [--out FOLDER]

Writes a trace for chrome://tracing or https://ui.perfetto.dev (.json.gz), the table as JSON and a plot. Providers are
described in benchmarks/step/providers.py.

Time is an operator's own, without the operators it calls: of its kernels on CUDA, of the host on a CPU. FLOPs are
those of PyTorch's flop counter for the shapes of the inputs, where it has a formula. Bytes count each tensor that the
operator takes once, and its result where that is no argument; they are given for products of matrices, for operators
that stream their arguments (sums, norms, activations, copies), and for kernels that torch.compile made for a GPU. An
operator that calls others which do the work has neither; lists of tensors (optimizer, averages) have no shapes in a
profile. `roofline` is the time that an operator cannot beat, the larger of FLOPs over the rate of a measured product of
square matrices and bytes over the measured bandwidth of a copy, as a share of the time it took.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import copy_bandwidth, default_device, product_rate
from benchmarks.official import add_official
from benchmarks.step.providers import open_official, parse_provider
from benchmarks.step.runs import CHECKED_STEPS, Run
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import add_workload, chosen_workload
from dmtjepa.devices import check_device
from dmtjepa.training.distributed import process_group

ITEM_SIZES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short int": 2}
STREAMING = (
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::copy_", "aten::gelu", "aten::native_layer_norm",
    "aten::_softmax", "aten::cat", "aten::sum", "aten::lerp",
)  # fmt: skip

Shapes = Sequence[Sequence[int]]


# Where the two matrices of a product are among an operator's arguments.
MATRICES = {
    "aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::_scaled_mm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2),
    "mkldnn::_linear_pointwise": (0, 1),
}  # fmt: skip
# Where queries and keys are among an attention's, the axis of their rows, and FLOPs per query, key and channel.
ATTENTIONS = {
    "aten::_flash_attention_forward": (0, 1, 1, 4),
    "aten::_flash_attention_backward": (1, 2, 1, 10),
    "aten::_efficient_attention_forward": (0, 1, 1, 4),
    "aten::_efficient_attention_backward": (1, 2, 1, 10),
    "aten::_scaled_dot_product_cudnn_attention": (0, 1, 2, 4),
    "aten::_scaled_dot_product_cudnn_attention_backward": (1, 2, 2, 10),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2, 4),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (1, 2, 2, 10),
}
# They call one of the above; and to a formula that is given shapes without their places, they mean something else.
WRAPPERS = ("xformers_flash::", "torch_attn::", "aten::_scaled_dot_product", "dmtjepa::onednn_linear")


def product_shape(name: str, shapes: Shapes) -> list[int]:
    """The shape of a product's result."""
    left, right = (shapes[place] for place in MATRICES[name])
    return [*left[:-1], right[0] if name.startswith("mkldnn") else right[-1]]


def flops(name: str, shapes: Shapes) -> float | None:
    """FLOPs of an operator; None where there is no formula for it, or none from shapes alone."""
    if name in MATRICES:
        return 2.0 * math.prod(product_shape(name, shapes)) * shapes[MATRICES[name][0]][-1]
    if name in ATTENTIONS:
        query, key, rows, each = ATTENTIONS[name]
        # Packed sequences have no dimension for images, and their lengths are not in the shapes.
        return float(each * math.prod(shapes[query]) * shapes[key][rows]) if len(shapes[query]) == 4 else None
    if name.startswith(WRAPPERS):
        return None
    space, _, operator = name.partition("::")
    formula = flop_registry.get(getattr(getattr(torch.ops, space, None), operator, None))
    if formula is None:
        return None
    try:
        return float(formula(*(shape or None for shape in shapes)))
    except (TypeError, ValueError, IndexError, AssertionError, AttributeError):  # it wants values too
        return None


def num_bytes(name: str, shapes: Shapes, types: Sequence[str]) -> float | None:
    """Bytes that an operator must move; None where its arguments do not tell."""
    sizes = [math.prod(shape) * ITEM_SIZES.get(kind, 1) for shape, kind in zip(shapes, types, strict=False) if shape]
    if not sizes:
        return None
    if name.startswith("triton_"):
        return float(sum(sizes))  # its results are arguments
    if name in MATRICES:
        result, last = product_shape(name, shapes), MATRICES[name][1]
        if result in [list(shape) for shape in shapes[last + 1 :]]:
            return float(sum(sizes))  # its result is an argument
        item = ITEM_SIZES.get(types[last] if last < len(types) else "", 1)
        return float(sum(sizes) + item * math.prod(result))
    if name.startswith(STREAMING):
        return float(sum(sizes) + max(sizes))
    return None


def operator_rows(profile: torch.profiler.profile, device: str, num_steps: int, ceilings: tuple[float, float]) -> list:
    """One row per operator, most time first; times, FLOPs and bytes are of one step."""
    kineto = profile.profiler.kineto_results.events()
    types = {event.correlation_id(): event.dtypes() for event in kineto if event.dtypes()}
    total: dict[str, dict] = defaultdict(lambda: {"calls": 0, "us": 0.0, "bound_us": 0.0, "flops": 0.0, "bytes": 0.0})
    rate, bandwidth = ceilings

    def add(event) -> tuple[bool, bool]:
        """Add an event, and all that it calls, to their rows; returns whether FLOPs and whether bytes were counted."""
        below = [add(called) for called in event.cpu_children]
        has_flops, has_bytes = (any(found) for found in zip(*below, strict=True)) if below else (False, False)
        row, shapes = total[event.name], event.input_shapes or []
        row["calls"] += 1
        row["us"] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        work = None if has_flops else flops(event.name, shapes)
        counted_below = has_flops or (has_bytes and work is None)
        moved = None if counted_below else num_bytes(event.name, shapes, types.get(event.id, []))
        row["flops"] += work or 0.0
        row["bytes"] += moved or 0.0
        row["bound_us"] += 1e6 * max((work or 0.0) / rate, (moved or 0.0) / bandwidth)
        return has_flops or work is not None, has_bytes or moved is not None

    for event in profile.events():
        if event.cpu_parent is None and event.device_type == torch.autograd.DeviceType.CPU:
            add(event)
    everything = sum(row["us"] for row in total.values())
    return [
        {
            "operator": name,
            "calls": row["calls"] / num_steps,
            "ms": row["us"] / num_steps / 1e3,
            "share": row["us"] / everything,
            "gflop": row["flops"] / num_steps / 1e9 or None,
            "gbytes": row["bytes"] / num_steps / 1e9 or None,
            "roofline": row["bound_us"] / row["us"] if row["bound_us"] else None,
        }
        for name, row in sorted(total.items(), key=lambda item: -item[1]["us"])
        if row["us"] > 0
    ]


COLUMNS = {
    "operator": lambda row: row["operator"][:60],
    "calls": number("calls", "{:.0f}"),
    "ms": number("ms", "{:.2f}"),
    "share": number("share", "{:.1%}"),
    "GFLOP": number("gflop"),
    "GB": number("gbytes", "{:.2f}"),
    "roofline": number("roofline", "{:.0%}"),
}


def plot(axes, rows: list[dict]) -> None:
    """Time of the operators, and how much of it the roofline allows for."""
    rows = rows[:25][::-1]
    names = [row["operator"][:50] for row in rows]
    axes.barh(names, [row["ms"] for row in rows], color="C0", label="measured")
    axes.barh(names, [row["ms"] * (row["roofline"] or 0) for row in rows], color="C1", label="roofline, where known")
    axes.set_xlabel("milliseconds of a step")
    axes.legend()


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser, "vit_huge:128" if device == "cuda" else "vit_small:16")
    parser.add_argument("--provider", default="project", help="see benchmarks/step/providers.py")
    add_official(parser)
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument("--top", type=int, default=25, help="rows that are printed")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="folder for the trace, a JSON file of the results and a plot")
    options = parser.parse_args()
    if device == "cpu":
        torch.set_num_threads(options.threads)
        torch._inductor.config.cpp.enable_kernel_profile = True  # compiled loops have names of their own
    open_official(options.official, [options.provider])
    provider, workload = parse_provider(options.provider, device), chosen_workload(options)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    ceilings = product_rate(device, provider.dtype), copy_bandwidth(device)
    with process_group(check_device(device), start_timeout=60, hang_timeout=600) as world:
        run = Run(workload, provider, world)
        for step in range(CHECKED_STEPS + options.steps):
            run(step)
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
            for step in range(CHECKED_STEPS, CHECKED_STEPS + options.steps):
                run.time(step)
            seconds = sum(phases["step"] for phases in run.seconds())
    rows = operator_rows(profile, device, options.steps, ceilings)
    ms = 1e3 * seconds / options.steps
    print(f"{workload.name}, {provider.name}: {ms:.1f} ms a step, profiled; operators take", end=" ")
    print(f"{sum(row['ms'] for row in rows) / ms:.0%} of it")
    print(f"ceilings: {ceilings[0] / 1e12:.2f} TFLOP/s, {ceilings[1] / 1e9:.0f} GB/s")
    print(text_table(COLUMNS, rows[: options.top], num_names=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(options.out / f"{device}-{date.today()}-trace.json.gz"))
    save(
        options.out, "profile", device, rows, plot=plot, workload=workload.name, provider=provider.name, ms_profiled=ms,
        product_tflop_per_s=ceilings[0] / 1e12, copy_gb_per_s=ceilings[1] / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
