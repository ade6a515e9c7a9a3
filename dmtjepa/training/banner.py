"""What a start says before its first step."""

from __future__ import annotations

import contextlib
import math
import os
import sys

import torch
from torch import nn

from dmtjepa.config import Config
from dmtjepa.data import StoredSource
from dmtjepa.data.sources.base import make_printable
from dmtjepa.devices import find_device
from dmtjepa.masks import mean_context_sizes
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import World
from dmtjepa.training.schedules import Schedules

LOADERS = {"pil": "PIL", "dali": "DALI"}
"""Loaders by their names in settings, named for the libraries that decode."""


def announce(
    config: Config, world: World, source: StoredSource, loader: str, model: nn.Module, schedules: Schedules, step: int
) -> None:
    """Print the facts of a start on rank 0. See `describe_start`."""
    if world.rank == 0:
        text = describe_start(
            config,
            source,
            world_size=world.world_size,
            device=world.device,
            loader=loader,
            steps_per_epoch=schedules.steps_per_epoch,
            num_parameters=count_trained(model),
            step=step,
        )
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(text, file=sys.stderr, flush=True)


def count_trained(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_start(
    config: Config,
    source: StoredSource,
    *,
    world_size: int,
    device: torch.device,
    loader: str,
    steps_per_epoch: int,
    num_parameters: int,
    step: int = 0,
) -> str:
    """The facts of a start as lines of text: images, loader, model, masks, device, batch, length, and where it writes.

    Args:
        source: of the images.
        world_size: number of processes.
        device: of this process; the others have the same kind. This machine may lack it, in a dry run.
        loader: its name, after `auto` was resolved.
        steps_per_epoch: optimizer steps.
        num_parameters: that are trained.
        step: that the run resumes from, 0 for a new one.
    """
    data, runtime, optimization = config.data, config.runtime, config.optimization
    plan = ComputePlan.from_config(config, device.type)
    method = "I-JEPA" if not config.patch.local_agg_head else f"DMT-JEPA, patch.query {config.patch.query}"
    if optimization.context_loss:
        method += f", context loss {optimization.context_loss:g}"
    height, width = data.image_size
    processes = _count(world_size, "process", "processes")
    num_steps = optimization.epochs * steps_per_epoch
    lines = {
        "images": make_printable(source.describe()),
        "loader": f"{LOADERS[loader]}, {_count(data.num_workers, 'worker')} for each process",
        "model": f"{config.meta.model_name}, patches of {config.mask.patch_size} in {height}x{width} pixels, "
        f"{num_parameters / 1e6:.1f} M trained parameters ({method})",
        "masks": _describe_masks(config, world_size * runtime.accumulation),
        "device": f"{world_size} x {_name_device(device)}, {str(plan.dtype).removeprefix('torch.')}"
        + (", compiled" if plan.compiled else ""),
        "batch": f"{config.global_batch(world_size)} images = {data.batch_size} x {processes}"
        + (f" x {runtime.accumulation} accumulated" if runtime.accumulation > 1 else ""),
        "length": f"{_count(optimization.epochs, 'epoch')} of {_count(steps_per_epoch, 'step')}, {num_steps} in all",
        "run": f"{os.path.abspath(config.logging.path)}, "
        + (f"resumes at step {step}" if step else _describe_new(config)),
    }
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())


def _describe_new(config: Config) -> str:
    """Official files ask for a checkpoint in runs that have none yet: there, load_checkpoint means to resume."""
    if config.meta.load_checkpoint and config.meta.read_checkpoint is None:
        return (
            "new, with drawn weights: meta.load_checkpoint is true, but there is no checkpoint to resume from, and "
            "meta.read_checkpoint names no weights"
        )
    return "new"


def _describe_masks(config: Config, num_shards: int) -> str:
    """How much of an image the student sees. On small grids the shortest context of a batch is much below the mean."""
    cut_together = num_shards if config.mask.context_cut == "global" else 1  # shards that a step has to sample
    size, whole = mean_context_sizes(config, num_shards, num_steps=max(1, 32 // cut_together))
    blocks, num_patches = _count(config.mask.num_pred_masks, "block"), math.prod(config.grid_size)
    text = f"{blocks} to predict from {size:.1f} of {num_patches} patches, on average"
    if config.mask.pack:
        return text
    if size < whole / 2:
        return f"{text}; contexts are cut to the shortest of a batch: mask.pack=true keeps {whole:.1f}"
    return f"{text} ({whole:.1f} before contexts are cut to the shortest of a batch)"


def _name_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {_count(torch.get_num_threads(), 'thread')}"
    if find_device(str(device)) is None:
        return "GPU (not on this machine)"
    return torch.cuda.get_device_name(device)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
