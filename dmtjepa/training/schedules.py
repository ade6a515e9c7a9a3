"""Learning rate, weight decay and teacher momentum as pure functions of the step.

Steps count from 0. The official code advances its learning-rate and weight-decay schedules *before* an update and its
momentum schedule after it: update `step` uses value number `step + 1` of the first two and number `step` of the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmtjepa.config import OptimizationSettings


@dataclass(frozen=True)
class Schedules:
    """The official schedules. `steps_per_epoch` counts optimizer steps; `num_epochs` and `warmup` are in epochs."""

    steps_per_epoch: int
    num_epochs: int
    warmup: float
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    ema: tuple[float, float]
    ipe_scale: float = 1.0

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_per_epoch * self.num_epochs

    @property
    def schedule_steps(self) -> int:
        """Steps after which learning rate and weight decay reach their final values."""
        return int(self.ipe_scale * self.num_epochs * self.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """Linear from `start_lr` to `lr` over the warm-up, then a cosine to `final_lr`."""
        count, warmup_steps = step + 1, int(self.warmup * self.steps_per_epoch)
        if count < warmup_steps:
            return self.start_lr + count / warmup_steps * (self.lr - self.start_lr)
        progress = min(1.0, (count - warmup_steps) / max(1, self.schedule_steps - warmup_steps))
        return _cosine(self.lr, self.final_lr, progress)

    def decay(self, step: int) -> float:
        """Weight decay: a cosine from `weight_decay` to `final_weight_decay`, without warm-up."""
        return _cosine(self.weight_decay, self.final_weight_decay, min(1.0, (step + 1) / max(1, self.schedule_steps)))

    def momentum(self, step: int) -> float:
        """Weight of the old teacher in its moving average: linear from `ema[0]` to `ema[1]`."""
        progress = step / (self.steps_per_epoch * self.num_epochs * self.ipe_scale)
        return self.ema[0] + min(1.0, progress) * (self.ema[1] - self.ema[0])


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedules(settings: OptimizationSettings, steps_per_epoch: int, global_batch: int) -> Schedules:
    """The schedules of the settings; learning rates scale with the global batch where `lr_batch_size` is set."""
    scale = global_batch / settings.lr_batch_size if settings.lr_batch_size else 1.0
    return Schedules(
        steps_per_epoch=steps_per_epoch,
        num_epochs=settings.epochs,
        warmup=settings.warmup,
        start_lr=scale * settings.start_lr,
        lr=scale * settings.lr,
        final_lr=scale * settings.final_lr,
        weight_decay=settings.weight_decay,
        final_weight_decay=settings.final_weight_decay,
        ema=settings.ema,
        ipe_scale=settings.ipe_scale,
    )
