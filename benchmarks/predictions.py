"""Predicted time of a step on one GPU, from FLOPs and bytes (docs/performance.md); no measurement confirms it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step of a workload (see benchmarks/workloads.py), by GPU."""

    workload: str
    seconds: dict[str, float]


PREDICTIONS = {
    "ViT-B/16": Prediction("vit_base:256", {"A100": 0.129, "H100": 0.056}),
    "ViT-L/16": Prediction("vit_large:256", {"A100": 0.360, "H100": 0.153}),
    "ViT-H/14": Prediction("vit_huge:128", {"A100": 0.436, "H100": 0.182}),
}
