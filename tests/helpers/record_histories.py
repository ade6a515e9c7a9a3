"""Record the histories that the verdict is tested on: short runs of small networks, some of which are made to fail.

    OMP_NUM_THREADS=1 python -m tests.helpers.record_histories IMAGES [NAME ...]

IMAGES is a folder of small photographs; CIFAR-10 was used. A run takes about half a minute of one core. Each writes
`tests/evaluation/histories/NAME.jsonl`, the figures that the verdict reads, rounded. Looks are taken every 20 steps and
not every 50, so that 240 steps show as much as 600. Six histories (zeros, grey, lr10x, and three healthy ones, of 300
steps of 32 images) are of runs with these settings that were made before this program. `past_collapse-street` is of
1,500 steps on street scenes (docs/experiments.md, the published recipe with a momentum from 0.98).
`over_training-64_images` and `healthy-200_images` are of 4,000 and 4,200 steps of `vit_nano` on so few photographs of
scenes, measured on others during training (docs/training_figures.md); every tenth look and all evaluations are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmtjepa.config import Config, parse_config
from dmtjepa.masks import MaskBatch
from dmtjepa.metrics_file import read_metrics
from dmtjepa.models import ARCHITECTURES
from dmtjepa.objective import DMTJEPA
from dmtjepa.run_folder import RunFolder
from dmtjepa.training import instruments
from dmtjepa.training.launch import run_process

HISTORIES = Path(__file__).parents[1] / "evaluation" / "histories"
FIGURES = (
    "train/loss", "train/update_norm", "train/lr", "train/weight_decay", "train/momentum",
    "targets/explained_variance", "targets/variance", "targets/variance_between_images",
    "targets/variance_of_position", "neighbors/changed", "features/effective_rank",
    "features/effective_rank_centered", "features/mean_cosine", "eval/linear", "eval/knn_20", "eval/images",
)  # fmt: skip
NUM_IMAGES = 240 * 16  # steps of 16 images
LOOK_EVERY = 20

DMT = {"patch.local_agg_head": True}
NANO = {"meta.model_name": "vit_nano", "meta.pred_emb_dim": 36}
PATCHES_OF_IMAGE = (32 // 4) ** 2

RUNS: dict[str, dict[str, Any]] = {
    "healthy-ijepa": {},
    "healthy-ijepa-seed1": {"runtime.seed": 1, "optimization.ema": [0.996, 1.0]},
    "healthy-pack-nano": NANO | {"mask.pack": True, "runtime.seed": 3},
    "healthy-crop24x40-init003": {"data.crop_size": [24, 40], "meta.init_std": 0.03, "runtime.seed": 4},
    "healthy-query_patch": DMT | {"patch.query": "patch", "runtime.seed": 5},
    "healthy_dmt-seed0": DMT,
    "collapse-zeros": {},
    "image_collapse-mean": {},
    "position-decay": {"optimization.weight_decay": 100.0, "optimization.final_weight_decay": 100.0},
    "position-grey": {"data.root_path": "grey"},
    "collapse-noise": {"data.root_path": "noise"},
    "small_steps-lr0": {"optimization.lr": 1e-9, "optimization.start_lr": 1e-9, "optimization.final_lr": 1e-9},
    "no_learning-lr_small": {"optimization.lr": 1e-5, "optimization.start_lr": 1e-5, "optimization.final_lr": 1e-6},
    "collapse-lr100x": {"optimization.lr": 2e-1},
    "slow_teacher-momentum1": {"optimization.ema": [1.0, 1.0]},
    "fast_teacher-lr10x": {"optimization.ema": [0.0, 0.0], "optimization.lr": 2e-2},
    "fast_teacher-ema0": {"optimization.ema": [0.0, 0.0]},
}  # fmt: skip


def average_targets(targets: Tensor, masks: MaskBatch) -> Tensor:
    """Targets [U, D] replaced by their mean over the image."""
    _, image, counts = torch.unique(masks.target_unique // PATCHES_OF_IMAGE, return_inverse=True, return_counts=True)
    sums = targets.new_zeros(len(counts), targets.shape[1]).index_add(0, image, targets)
    return (sums / counts[:, None])[image]


BROKEN_TARGETS: dict[str, Callable[[Tensor, MaskBatch], Tensor]] = {
    "collapse-zeros": lambda targets, masks: torch.zeros_like(targets),
    "image_collapse-mean": average_targets,
}
"""What runs train on instead of their targets."""


def prepare_images(images: Path, folder: Path) -> None:
    """List photographs of all classes in `folder`, and draw images from which nothing can be learnt: grey ones, noise.

    Args:
        images: folder of at least `NUM_IMAGES` photographs.
        folder: becomes `photographs.txt`, `grey/` and `noise/`.
    """
    paths = sorted(path for path in images.resolve().rglob("*") if path.suffix in (".jpg", ".png"))
    chosen = paths[:: len(paths) // NUM_IMAGES][:NUM_IMAGES]
    (folder / "photographs.txt").write_text("".join(f"{path}\n" for path in chosen))
    generator = np.random.default_rng(0)
    for name in ("grey", "noise"):
        (folder / name).mkdir()
        for index in range(NUM_IMAGES):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            if name == "grey":
                pixels[:] = 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def settings(folder: Path, images: Path, changes: Mapping[str, Any]) -> Config:
    """The settings of a run in `folder`, with `changes` such as {"optimization.lr": 1e-3}."""
    values: dict[str, dict[str, Any]] = {
        "data": {
            "batch_size": 16, "crop_size": 32, "crop_scale": [0.5, 1.0], "root_path": str(images), "num_workers": 0,
            "loader": "pil",
        },
        "logging": {"folder": str(folder)},
        "mask": {"patch_size": 4, "min_keep": 4, "sampler": "corrected"},
        "patch": {"local_agg_head": False},
        "meta": {"model_name": "vit_tiny", "pred_depth": 2, "pred_emb_dim": 32, "init_std": 0.06},
        "optimization": {
            "epochs": 1, "warmup": 0, "lr": 2e-3, "start_lr": 2e-4, "final_lr": 1e-5, "ema": [0.98, 1.0],
            "weight_decay": 0.05, "final_weight_decay": 0.1,
        },
        "runtime": {"log_every": 10, "keep_last": 1, "compile": "off", "precision": "float32"},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = value
    return parse_config(values)


def select_figures(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The figures that the verdict reads, with four digits."""
    for row in rows:
        values = {name: row[name] for name in FIGURES if name in row}
        yield {"step": row["step"]} | {name: value and float(f"{value:.4g}") for name, value in values.items()}


def record(name: str, folder: Path) -> None:
    """Make the run `name` on the images in `folder` and write its history."""
    changes = {"data.root_path": "photographs.txt"} | RUNS[name]
    images = folder / changes.pop("data.root_path")
    config = settings(folder / name, images, changes)
    compute_targets = DMTJEPA.compute_targets
    if name in BROKEN_TARGETS:
        DMTJEPA.compute_targets = lambda model, images, masks: BROKEN_TARGETS[name](
            compute_targets(model, images, masks), masks
        )
    try:
        run_process(config, "cpu")
    finally:
        DMTJEPA.compute_targets = compute_targets
    rows = select_figures(read_metrics(RunFolder.from_config(config).metrics_file))
    (HISTORIES / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all by default")
    arguments = parser.parse_args()
    instruments.LOOK_EVERY = LOOK_EVERY
    ARCHITECTURES["vit_tiny"] = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    ARCHITECTURES["vit_nano"] = {"embed_dim": 96, "depth": 4, "num_heads": 3, "mlp_ratio": 2.0}
    with tempfile.TemporaryDirectory() as folder:
        prepare_images(arguments.images, Path(folder))
        for name in arguments.names or RUNS:
            record(name, Path(folder))


if __name__ == "__main__":
    main()
