"""Predicted times on one GPU, from FLOPs and bytes. docs/performance.md compares them with what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step of a workload (see benchmarks/workloads.py), by GPU.

    `seconds` is a ceiling: products and unique bytes at the rates that libraries reach. `with_kernels` also counts what
    the kernels of Inductor read and write.
    """

    workload: str
    seconds: dict[str, float]
    with_kernels: dict[str, float]


PREDICTIONS = {
    "ViT-B/16": Prediction("vit_base:256", {"A100": 0.129, "H100": 0.056}, {"H100": 0.064}),
    "ViT-L/16": Prediction("vit_large:256", {"A100": 0.360, "H100": 0.153}, {"H100": 0.176}),
    "ViT-H/14": Prediction("vit_huge:128", {"A100": 0.436, "H100": 0.182}, {"H100": 0.212}),
}

# Microseconds of an operator at ViT-H/14, 128 images, bfloat16, on an H100.
OPERATORS_HUGE = {
    "gather_tokens": 23,
    "gather_tokens backward": 42,
    "embed_patches all": 24,
    "embed_patches context": 9,
    "select_neighbors": 24,
    "aggregate_neighbors": 103,
    "pool_neighbors": 37,
    "indexed_smooth_l1": 29,
    "indexed_smooth_l1 backward": 46,
}
