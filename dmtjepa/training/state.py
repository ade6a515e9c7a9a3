"""The state of a run on one rank: everything that a checkpoint holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmtjepa.checkpoint_format import load_into, read_meta, tensor_names
from dmtjepa.config import Config
from dmtjepa.data.fingerprint import Fingerprint
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.distributed import World
from dmtjepa.training.optimizer import ShardedAdamW
from dmtjepa.training.schedules import Schedules

logger = logging.getLogger(__name__)


class TrainingState:
    """Weights, optimizer, counters and random generators.

    Args:
        config, world, schedules: of the run.
        model: sharded (`parallelize`).
        optimizer: of the student's parameters.
        images: what the run trains on.

    Attributes:
        step: number of finished steps.
        num_skipped: number of steps that were skipped because loss or gradient was not finite.
        epoch_loss: sum and number of the finite losses of the current epoch.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        model: DMTJEPA,
        optimizer: ShardedAdamW,
        schedules: Schedules,
        images: Fingerprint,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._config, self._world, self._schedules, self._images = config, world, schedules, images
        self.step = 0
        self.num_skipped = 0
        self.epoch_loss: tuple[float, int] = (0.0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name, sharded as they are."""
        tensors = model_state(self.model, self.optimizer)
        tensors[f"rng.{self._world.rank}"] = torch.get_rng_state()
        if self._world.device.type == "cuda":
            tensors[f"rng.cuda.{self._world.rank}"] = torch.cuda.get_rng_state(self._world.device)
        return tensors

    def meta(self, *, keep: bool) -> dict[str, Any]:
        """The plain values of a checkpoint. `epoch` is the number of finished epochs.

        Args:
            keep: whether the checkpoint is never removed.
        """
        epoch, step_in_epoch = divmod(self.step, self._schedules.steps_per_epoch)
        last = self.step - 1
        loss, count = self.epoch_loss
        return {
            "step": self.step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "steps_per_epoch": self._schedules.steps_per_epoch,
            "num_images": self._images.num_images,
            "images": self._images.to_meta(),
            "loss": loss / count if count else None,
            "epoch_loss": self.epoch_loss,
            "lr": self._schedules.learning_rate(last),
            "weight_decay": self._schedules.decay(last),
            "optimizer_steps": optimizer_steps(self.optimizer),
            "num_skipped": self.num_skipped,
            "batch_size": self._config.data.batch_size,
            "accumulation": self._config.runtime.accumulation,
            "world_size": self._world.world_size,
            "global_batch": self._config.global_batch(self._world.world_size),
            "parameters": [name for name, p in self.model.named_parameters() if p.requires_grad],
            "keep": keep,
            "config": self._config.model_dump(mode="json"),
        }

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. Any number of ranks may have written it, on devices of any kind.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        meta = read_meta(checkpoint)
        # The generators may belong to another number of ranks. Those of CUDA are not in a checkpoint of CPUs.
        held = tensor_names(checkpoint) if meta["world_size"] == self._world.world_size else set()
        tensors = {
            name: tensor for name, tensor in self.tensors().items() if not name.startswith("rng.") or name in held
        }
        load_into(tensors, checkpoint)
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        set_optimizer_steps(self.optimizer, meta["optimizer_steps"])
        if f"rng.{self._world.rank}" in tensors:
            torch.set_rng_state(tensors[f"rng.{self._world.rank}"])
        if f"rng.cuda.{self._world.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{self._world.rank}"], self._world.device)
        self.step, self.num_skipped = meta["step"], meta["num_skipped"]
        loss, count = meta["epoch_loss"]
        self.epoch_loss = (loss, count)
        if self._world.rank == 0:
            logger.info(
                "resumed from %s: step %d, epoch %d, written by %d processes",
                checkpoint, meta["step"], meta["epoch"], meta["world_size"],
            )  # fmt: skip


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the two averages of AdamW by name, sharded as they are.

    Averages that do not exist yet, because no step was made, are created as zeros, so that they can be loaded into.
    """
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        row = optimizer.state[parameter]
        if not row:
            row["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            row["exp_avg"] = torch.zeros_like(parameter)
            row["exp_avg_sq"] = torch.zeros_like(parameter)
        state[f"exp_avg.{name}"] = row["exp_avg"]
        state[f"exp_avg_sq.{name}"] = row["exp_avg_sq"]
    return state


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates that AdamW has made: steps without the skipped ones."""
    return int(next((row["step"] for row in optimizer.state.values()), 0))


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Continue the bias correction of AdamW after `steps` updates."""
    for row in optimizer.state.values():
        row["step"].fill_(steps)
