"""What happens to steps whose loss or gradient is not finite."""

from __future__ import annotations

import logging
from typing import Any

from dmtjepa.config import Config
from dmtjepa.errors import UserError
from dmtjepa.training.distributed import World
from dmtjepa.training.metrics import StepValues
from dmtjepa.training.saving import Saver
from dmtjepa.training.state import TrainingState

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError, RuntimeError):
    """More steps than allowed had a loss or gradient that is not finite; the message names steps, samples and files."""


class FiniteCheck:
    """Adds up the losses of an epoch and stops the run after more than `optimization.max_skipped_steps` bad steps."""

    def __init__(self, config: Config, world: World, state: TrainingState, saver: Saver) -> None:
        self._config, self._world, self._state, self._saver = config, world, state, saver

    def check(self, steps: list[StepValues]) -> None:
        """Count finished steps.

        Raises:
            NonFiniteLoss: too many steps were skipped. The state was saved in the folder `not_finite`.
        """
        finite = [value.loss for value in steps if value.finite]
        total, count = self._state.epoch_loss
        for loss in finite:  # one by one: the order of a sum counts
            total += loss
        self._state.epoch_loss = (total, count + len(finite))

        rows = [self._describe(value) for value in steps if not value.finite]
        if not rows:
            return
        self._state.num_skipped += len(rows)
        allowed, skipped = self._config.optimization.max_skipped_steps, self._state.num_skipped
        text = "; ".join(
            f"step {row['step']} (epoch {row['epoch']}, samples {row['samples'][0]} to {row['samples'][1]} of its "
            f"order): loss {row['loss']}, gradient norm {row['gradient_norm']}"
            for row in rows
        )
        if skipped <= allowed:
            if self._world.rank == 0:
                logger.warning("skipped, %d of at most %d: %s", skipped, allowed, text)
            return
        folder = self._saver.save_not_finite(rows)
        raise NonFiniteLoss(
            f"{text}. {skipped} steps were skipped in all and optimization.max_skipped_steps is {allowed}. "
            f"The student never took these steps; the state after them and a description are in {folder}. To go on "
            f"from the last checkpoint and skip such steps, raise optimization.max_skipped_steps and start again"
        )

    def _describe(self, value: StepValues) -> dict[str, Any]:
        record = value.record
        global_batch = self._config.global_batch(self._world.world_size)
        first = record.step_in_epoch * global_batch
        return {
            "step": record.step,
            "epoch": record.epoch,
            "seed": self._config.runtime.seed,
            "samples": [first, first + global_batch - 1],
            "loss": str(value.loss),
            "gradient_norm": str(value.norm),
            "learning_rate": record.learning_rate,
        }
