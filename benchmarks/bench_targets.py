"""The target head, features to targets: this project against the method op for op (`dmtjepa.reference`).

Measured is `AggregationHead.aggregate_neighbors` on one step's covered patches, beside the reference's
`aggregate_neighbors` on all patches followed by reading the target blocks, as published. Time is the median of
interleaved calls; memory is what a call's tensors hold at their peak, on top of its inputs.

    python -m benchmarks.bench_targets [--shapes base:8 huge:16] [--published CHECKOUT] [--out FOLDER]

`--published` adds the published head from a checkout of that code, its missing `Mlp` supplied from its own encoder.
Its queries come from other images when B > 1, so it is timed with its own targets and not checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import SHAPES, Shape, environment, relative_error
from dmtjepa import reference
from dmtjepa.config import MaskSettings
from dmtjepa.masking import sample_masks
from dmtjepa.models import AggregationHead

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
TARGETS_CPU = ["base:8", "huge:16"]


def load_published_head(checkout: Path) -> Callable[[int, int], nn.Module]:
    """The published `LocalAggHead`, read from a checkout: (width, heads) -> module."""
    sys.path.insert(0, str(checkout))
    from src.models.vision_transformer import MLP

    path = checkout / "src/models/local_agg_head.py"
    spec = importlib.util.spec_from_file_location("published_head", path)
    module = importlib.util.module_from_spec(spec)
    module.Mlp = MLP
    spec.loader.exec_module(module)
    return lambda dim, num_heads: module.LocalAggHead(dim, num_heads, k_num=4, k_size=3)


def read_blocks(h: Tensor, target_index: Tensor) -> Tensor:
    """[B, N, D] at [B, M, T] -> [B, M, T, D], as the published step does."""
    rows = h.gather(1, target_index.flatten(1)[..., None].expand(-1, -1, h.shape[-1]))
    return rows.unflatten(1, target_index.shape[1:])


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that a call allocates at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    # Allocations and releases of tensors in their order; the resident set would also count what malloc keeps.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(shape: Shape, batch_size: int, device: str, dtype: torch.dtype, repeats: int, published=None) -> list[dict]:
    """One row per provider."""
    torch.manual_seed(0)
    masks = sample_masks(MaskSettings(), shape.grid_size, batch_size, seed=0, step=0, rank=0)
    masks = masks.to(device) if device == "cuda" else masks
    head = AggregationHead(shape.dim, shape.num_heads).to(device, dtype).requires_grad_(False)
    h = F.layer_norm(torch.randn(batch_size, shape.num_patches, shape.dim, device=device), (shape.dim,)).to(dtype)
    parameters = reference.parameters_of(head)

    def fast() -> Tensor:
        return head.aggregate_neighbors(h, shape.grid_size, masks.target_unique, masks.neighborhood)

    def slow() -> Tensor:
        everywhere = reference.aggregate_neighbors(parameters, h, shape.grid_size, shape.num_heads)
        return read_blocks(everywhere, masks.target_index)

    providers = {"this project": fast, "reference": slow}
    if device == "cuda":
        compiled = torch.compile(slow)
        providers["reference, compiled"] = compiled
    if published is not None:
        theirs = published(shape.dim, shape.num_heads).to(device, dtype).requires_grad_(False)
        theirs.load_state_dict(head.state_dict())
        providers["published"] = lambda: read_blocks(theirs(h, loc=True), masks.target_index)

    error = relative_error(fast()[masks.target_slot], slow())
    if error > LIMIT[dtype]:
        raise SystemExit(f"{shape.name} B={batch_size}: the targets are wrong (error {error:.1e}); nothing was timed")
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
                "shape": shape.name, "batch": batch_size, "provider": name, "dtype": str(dtype), "error": error,
                "ms": ms, "peak_mib": memory[name] / 2**20,
                "time_of_reference": ms / statistics.median(times["reference"]),
                "memory_of_reference": memory[name] / memory["reference"],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [f"{s.name}:{s.batch_size}" for s in SHAPES.values()] if device == "cuda" else TARGETS_CPU
    parser.add_argument("--shapes", nargs="+", default=default, help="model:batch, e.g. base:8")
    parser.add_argument("--repeats", type=int, default=30 if device == "cuda" else 9)
    parser.add_argument("--published", type=Path, help="a checkout of the published code")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    options = parser.parse_args()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    published = load_published_head(options.published) if options.published else None
    rows = []
    print(f"{'shape':<12}{'provider':<22}{'ms':>10}{'speed':>8}{'peak MiB':>10}{'memory':>8}")
    for text in options.shapes:
        name, batch = text.split(":")
        with torch.inference_mode():
            found = measure(SHAPES[name], int(batch), device, dtype, options.repeats, published)
        rows += found
        for row in found:
            speed = f"{1 / row['time_of_reference']:.2f}x"
            print(
                f"{text:<12}{row['provider']:<22}{row['ms']:>10.2f}{speed:>8}{row['peak_mib']:>10.1f}"
                f"{row['memory_of_reference']:>7.2f}x"
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        hardware = "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "-").lower()
        path = options.out / f"{hardware}-{date.today()}-targets.json"
        path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
