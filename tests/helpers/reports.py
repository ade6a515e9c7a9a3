"""A report with everything that one can hold, made up, with names that try to break a page."""

from __future__ import annotations

import json
from pathlib import Path

from dmtjepa.evaluation.formatting import Report

HOSTILE = "<script src=http://127.0.0.1:9/x.js>alert('&')</script>"
ENCODERS = ("trained", "student", "untrained")
ACCURACY = {"trained": 0.6, "student": 0.58, "untrained": 0.4, "pixels": 0.5}


def make_report(name: str = "run", **changes) -> Report:
    """All measurements, on 400 images."""
    knn = {features: {5: value - 0.1, 20: value} for features, value in ACCURACY.items()}
    numbers = {
        "effective_rank": 20.5,
        "num_dimensions": 192,
        "effective_rank_centered": 31.2,
        "feature_std": 0.2,
        "feature_std_min": 0.01,
        "mean_cosine": 0.4,
    }
    values = {
        "run": {
            "name": name,
            "folder": f"/runs/{name}",
            "checkpoint": f"/runs/{name}/jepa-latest.pth.tar",
            "model": "vit_tiny",
            "patch_size": 8,
            "image_size": [32, 48],
            "parameters": 5_000_000,
            "epoch": 2,
            "seed": 0,
            "torch": "2.11.0",
        },
        "data": {
            "description": f"/images/{HOSTILE}",
            "train_images": 2000,
            "validation_images": 400,
            "classes": 10,
            "most_frequent_class": 0.1,
        },
        "knn": knn,
        "knn_plain": knn,
        "knn_layout": {features: knn[features] for features in ENCODERS},
        "linear": dict(ACCURACY),
        "attentive": {features: ACCURACY[features] for features in ENCODERS},
        "protocols": {"DINO k-NN, k = 20": {features: ACCURACY[features] for features in ENCODERS}},
        "low_shot": {"1%": {features: {"mean": 0.3, "std": 0.02, "num_images": 20} for features in ACCURACY}},
        "collapse": {features: dict(numbers) for features in ENCODERS},
        "segmentation": {
            features: {"mean_iou": value, "mean_iou_error": 0.01, "object_iou": value}
            for features, value in ACCURACY.items()
        },
        "loss": {"first": 0.5, "last": 0.1, "steps": 100},
        "verdict": ["No sign of a fault: the predictions explain 40% of the targets' variance"],
        "notes": [f"1 class has no validation image: {HOSTILE}"],
        "skipped": [f"k-NN with k above 30: {HOSTILE}"],
    }
    return Report(**(values | changes))


def write_metrics(folder: Path, num_steps: int = 200, *, offset: float = 0.0) -> None:
    """`metrics.jsonl` of a run that logged each tenth step, looked each fiftieth, and evaluated twice."""
    rows = []
    for step in range(9, num_steps, 10):
        row = {
            "step": step,
            "train/loss": 1 / (1 + step) + offset,
            "targets/explained_variance": None if step == 9 else step / (step + 50) - offset,
            "train/lr": 1e-3,
            "train/images_per_second": 100.0 + step % 30,
            "train/data_wait": 0.02,
        }
        if step % 50 == 49:
            row |= {"features/effective_rank": 10 + step / 10}
        if step % 100 == 99:
            row |= {"eval/knn_20": 0.4, "eval/linear": 0.5, "eval/seconds": 3.0}
        rows.append(json.dumps(row) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(rows))
