"""One training step: the teacher's targets, the student's predictions, the update of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dmtjepa.config import OptimizationSettings
from dmtjepa.masks import MaskBatch
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_schedules
from dmtjepa.training.schedules import Schedules

Batch = tuple[Tensor, MaskBatch]
"""Images uint8 [B,3,H,W] and their masks, on the device."""


class TrainStep:
    """Updates student and teacher from a batch, without the host ever waiting for the device.

    Args:
        model: already spread over `mesh` (`parallelize`).
        settings, schedules: of the optimizer.
        device: where batches and losses are.
        at: called with the name of each phase as it begins: targets, predictions, loss, backward, update, teacher.
    """

    def __init__(
        self,
        model: DMTJEPA,
        settings: OptimizationSettings,
        schedules: Schedules,
        mesh: DeviceMesh,
        device: torch.device,
        at: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.model, self.settings, self.schedules, self.device, self.at = model, settings, schedules, device, at
        modules = (model.encoder, model.predictor, model.head)
        self.optimizer = build_optimizer(module for module in modules if module is not None)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.num_copies = mesh.size() // mesh["shard"].size()

    def __call__(self, batches: list[Batch], step: int) -> tuple[Tensor, Tensor]:
        """Step number `step` from the batches of an accumulation; returns loss and gradient norm, scalars.

        Where either is not finite on any rank, the student stays as it is.
        """
        loss = torch.zeros((), device=self.device)
        for images, masks in batches:
            self.at("targets")
            targets = self.model.compute_targets(images, masks)
            self.at("predictions")
            predictions = self.model.predict_targets(images, masks)
            self.at("loss")
            part = self.model.loss(predictions, targets, masks) / len(batches)
            self.at("backward")
            part.backward()
            loss += part.detach()

        self.at("update")
        norm = gradient_norm(self.parameters, loss, self.num_copies)
        if self.settings.clip_grad is not None:
            clip_gradients(self.parameters, norm, self.settings.clip_grad)
        set_schedules(self.optimizer, self.schedules.learning_rate(step), self.schedules.decay(step))
        self.optimizer.found_inf = (~norm.isfinite()).float()  # AdamW's kernel skips on the device
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at("teacher")
        self.model.update_teacher(self.schedules.momentum(step))
        return loss, norm
