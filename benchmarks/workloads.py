"""Workloads of the benchmarks: a model at a number of images per device, written `vit_huge:128`.

The settings are those of the official run of the model, or of ViT-B/16's run for a model without one. The images are
one batch of random pixels. The masks are those that the trainer samples at steps 0, 1, 2, ... of seed 0, so a number of
steps stands for a recording of masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dmtjepa.config import Config, ConfigError, load_config
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.models import ARCHITECTURES
from dmtjepa.training.estimate import MaskShapes, step_flops

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {"vit_large": "in1k_vitl16_ep600", "vit_huge": "in1k_vith14_ep300", "vit_giant": "in22k_vitg16_ep44"}
OTHER_MODELS = "in1k_vitb16_ep600"
# The models of the official configurations, at their images per device.
OFFICIAL_WORKLOADS = ("vit_base:256", "vit_large:256", "vit_huge:128", "vit_giant:128")


@dataclass(frozen=True)
class Workload:
    """A model at a batch.

    Args:
        model: the name of the encoder, as in `meta.model_name`.
        batch_size: images per device, B.
        overrides: settings that differ from the official run, e.g. `data.crop_size=96`.
    """

    model: str
    batch_size: int
    overrides: tuple[str, ...] = ()

    @cache  # noqa: B019  a few workloads live as long as the program
    def config(self, *overrides: str) -> Config:
        """The settings of a run of this workload, with further `overrides`."""
        changes = [f"meta.model_name={self.model}", f"data.batch_size={self.batch_size}", *self.overrides]
        return load_config(CONFIGS / f"{RUNS.get(self.model, OTHER_MODELS)}.yaml", [*changes, *overrides])

    @property
    def name(self) -> str:
        """For tables and plots, e.g. `ViT-huge/14 B=128`."""
        return f"{self.model.replace('vit_', 'ViT-')}/{self.patch_size} B={self.batch_size}"

    @property
    def description(self) -> dict[str, str | int]:
        """The columns of a result that say what was measured."""
        return {"workload": self.name, "model": self.model, "batch": self.batch_size}

    @property
    def dim(self) -> int:
        return int(ARCHITECTURES[self.model]["embed_dim"])

    @property
    def num_heads(self) -> int:
        return int(ARCHITECTURES[self.model]["num_heads"])

    @property
    def patch_size(self) -> int:
        return self.config().mask.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config().data.image_size

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.config().grid_size

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @cache  # noqa: B019
    def masks(self, step: int, shard: int = 0, num_shards: int = 1, device: torch.device | str = "cpu") -> MaskBatch:
        """The masks of a step, on `device`, of one of the ranks that share the global batch."""
        return MaskSampler.from_config(self.config(), seed=0).sample(step, shard, num_shards).to(device)

    def images(self, device: torch.device | str, shard: int = 0) -> Tensor:
        """uint8 [B, 3, H, W], the same at every step."""
        size = (self.batch_size, 3, *self.image_size)
        generator = torch.Generator().manual_seed(shard)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8, device="cpu").to(device)

    def mask_shapes(self, step: int) -> MaskShapes:
        """Patches per image of the masks of a step."""
        masks = self.masks(step)
        per_image = (len(masks.target_unique) / self.batch_size, len(masks.neighborhood) / self.batch_size)
        return MaskShapes(masks.context_size, masks.target_index.shape[2], *per_image)

    def flops(self, step: int) -> float:
        """FLOPs of this project's step at the shapes of its masks (`dmtjepa.training.estimate`)."""
        return self.batch_size * sum(step_flops(self.config(), self.mask_shapes(step)).values())


def parse_workload(text: str, overrides: Iterable[str] = ()) -> Workload:
    """A workload from its text, `vit_huge:128`: a model and its images per device."""
    model, _, batch = text.partition(":")
    if not batch.isdigit():
        raise SystemExit(f"workload {text!r}: write it as model:batch, e.g. vit_huge:128")
    workload = Workload(model, int(batch), tuple(overrides))
    try:
        workload.config()
    except ConfigError as error:
        raise SystemExit(f"ConfigError: {error}") from None
    return workload


def add_workloads(parser: argparse.ArgumentParser, default: Iterable[str]) -> None:
    """Add `--workloads` and `--set`; `chosen_workloads` reads them."""
    default = list(default)
    help_text = f"model:batch per device, default: {' '.join(default)}"
    parser.add_argument("--workloads", nargs="+", default=default, metavar="MODEL:BATCH", help=help_text)
    add_settings(parser)


def add_workload(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--workload` and `--set`; `chosen_workload` reads them."""
    help_text = f"model:batch per device, default: {default}"
    parser.add_argument("--workload", default=default, metavar="MODEL:BATCH", help=help_text)
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    help_text = "settings of the workload, e.g. data.crop_size=96 mask.min_keep=2"
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help=help_text)


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    return [parse_workload(text, options.set) for text in options.workloads]


def chosen_workload(options: argparse.Namespace) -> Workload:
    return parse_workload(options.workload, options.set)
