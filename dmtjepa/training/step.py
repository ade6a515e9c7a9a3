"""One training step: the teacher's targets, the student's predictions, the update of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dmtjepa.config import OptimizationSettings
from dmtjepa.masks import MaskBatch
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.batches import MicroBatch
from dmtjepa.training.fused_update import FusedUpdate
from dmtjepa.training.instruments import Observer
from dmtjepa.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_schedules
from dmtjepa.training.phase import Phase
from dmtjepa.training.schedules import Schedules


def _ignore_phase(phase: Phase) -> None:
    pass


class TrainStep:
    """Updates student and teacher. The host never waits for the device.

    Args:
        model: sharded over `mesh` (`parallelize`).
        settings, schedules: of the optimizer.
        mesh: one dimension `shard`, or `copy` and `shard`.
        device: where batches and losses are.
        on_phase: called at the start of each phase, from `Phase.TARGETS` to `Phase.TEACHER`.
        observer: sees the parts of each step, see `Instruments`.
        fused: whether one kernel updates student and teacher, see `FusedUpdate`.
    """

    def __init__(
        self,
        model: DMTJEPA,
        settings: OptimizationSettings,
        schedules: Schedules,
        mesh: DeviceMesh,
        device: torch.device,
        on_phase: Callable[[Phase], None] = _ignore_phase,
        observer: Observer | None = None,
        *,
        fused: bool = False,
    ) -> None:
        self.model, self.settings, self.schedules = model, settings, schedules
        self.device, self.on_phase, self.observer = device, on_phase, observer or Observer()
        modules = (model.encoder, model.predictor, model.head)
        self.optimizer = build_optimizer(module for module in modules if module is not None)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.num_copies = mesh.size() // mesh["shard"].size()
        self.fused_update = FusedUpdate(model, self.optimizer, device) if fused else None

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int) -> tuple[Tensor, Tensor]:
        """Make one update from the micro-batches of a step.

        The student keeps its weights if loss or gradient is not finite on any rank.

        Args:
            micro_batches: images uint8 [B,3,H,W] and masks, on the device. Their gradients are averaged.
            step: number of the step, from 0.

        Returns:
            The loss of this rank and the norm of the whole gradient: float32 scalars on the device.
        """
        self.observer.start_step(step, micro_batches)
        self.set_rates(step)
        return self.advance(micro_batches, step)

    def set_rates(self, step: int) -> None:
        """Set learning rate, decay and momentum of a step, where a fused update reads them from the device."""
        if self.fused_update is not None:
            schedules = self.schedules
            self.fused_update.set_rates(schedules.learning_rate(step), schedules.decay(step), schedules.momentum(step))

    def advance(
        self,
        micro_batches: Sequence[MicroBatch],
        step: int,
        covered: Sequence[MaskBatch] | None = None,
        *,
        quiet: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """All of a step that runs on the device, see `__call__`. With a fused update it can be captured into a graph.

        Args:
            covered: the masks that the observer sees, where those of `micro_batches` are padded.
            quiet: do not call `on_phase`.
        """
        on_phase = _ignore_phase if quiet else self.on_phase
        loss = torch.zeros((), device=self.device)
        all_covered = covered or [masks for _, masks in micro_batches]
        for number, ((images, masks), seen) in enumerate(zip(micro_batches, all_covered, strict=True), 1):
            if self.num_copies > 1 and len(micro_batches) > 1:
                # The copies exchange the sum over the micro-batches, and not the gradient of each.
                cast("FSDPModule", self.model).set_requires_all_reduce(number == len(micro_batches))
            on_phase(Phase.TARGETS)
            targets = self.model.compute_targets(images, masks)
            on_phase(Phase.PREDICTIONS)
            predictions = self.model.predict_targets(images, masks)
            on_phase(Phase.LOSS)
            micro_loss = self.model.loss(predictions, targets, masks) / len(micro_batches)
            self.observer.see_batch(predictions, targets, seen)
            on_phase(Phase.BACKWARD)
            micro_loss.backward()
            loss += micro_loss.detach()

        on_phase(Phase.UPDATE)
        norm = gradient_norm(self.parameters, loss, self.num_copies)
        if self.fused_update is None:
            self._update(norm, step)
        else:
            self.fused_update(norm, self.settings.clip_grad, self.observer.see_update)
        return loss, norm

    def _update(self, norm: Tensor, step: int) -> None:
        """Clip the gradient, then update the student, then the teacher."""
        if self.settings.clip_grad is not None:
            clip_gradients(self.parameters, norm, self.settings.clip_grad)
        set_schedules(self.optimizer, self.schedules.learning_rate(step), self.schedules.decay(step))
        self.optimizer.found_inf = (~norm.isfinite()).float()  # AdamW's kernel skips on the device
        self.optimizer.step(self.observer.see_update)
        self.optimizer.zero_grad()
        self.on_phase(Phase.TEACHER)
        self.model.update_teacher(self.schedules.momentum(step))
