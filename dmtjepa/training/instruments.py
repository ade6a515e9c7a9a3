"""The instruments of a run: which steps are measured, and what of them stays on the device until it is logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmtjepa.config import Config
from dmtjepa.evaluation.instruments import (
    NUM_ERROR_SUMS,
    NUM_PAIR_SUMS,
    count_changed,
    describe_features,
    explained_variance,
    read_targets,
    sum_errors,
    sum_targets,
)
from dmtjepa.kernels import backend
from dmtjepa.masks import MaskBatch
from dmtjepa.models.predictor import Predictions
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.batches import MicroBatch

LOOK_EVERY = 50
"""At least so many steps lie between two looks at features and neighbours, which cost more than the other figures."""
NUM_SAMPLES = 256
"""At most so many features give an effective rank."""


@dataclass(frozen=True)
class Reading:
    """What was measured in a step. Nothing has been fetched from the device.

    sums: float32 [n], to be added over ranks: the update and the weights squared, changed and all neighbours (0 where
        no look was taken), then those of `sum_targets` and, with a context loss, those of `sum_errors` for the context.
    has_context: whether there are these last ones.
    features: pooled features of the teacher, float32 [n, D], and targets, [n, D], of this rank. Empty without a look.
    """

    sums: Tensor
    has_context: bool
    features: dict[str, Tensor] = field(default_factory=dict)


class Observer:
    """Sees the parts of a training step and does nothing: what a `TrainStep` without instruments has."""

    measures = False
    """Whether it looks at the current step. Such a step is not replayed from a CUDA graph."""

    def start_step(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Before anything of a step is computed."""

    def see_batch(self, predictions: Predictions, targets: Tensor, masks: MaskBatch) -> None:
        """After the loss of a micro-batch: predictions, and targets [U, D], or [U + V, D] with a context loss.

        Where the masks of the step were padded, there are more targets than `masks` has: V are the last ones.
        """

    def see_update(self, weights: list[Tensor]) -> AbstractContextManager[None]:
        """Encloses the update of some weights of the student, those of this rank. Called until all are updated."""
        return nullcontext()


class Instruments(Observer):
    """Measures the steps that are logged. The host never waits for the device, and training is not changed.

    Features are those of the teacher in the last steps before a look, at most `NUM_SAMPLES` images. Neighbors are
    chosen again for the same images at each look: the first batch of this start, so that only the teacher differs.

    Args:
        model: of the run, sharded.
        config: of the run.
        num_steps: of the run.
    """

    def __init__(self, model: DMTJEPA, config: Config, num_steps: int) -> None:
        self._model, self._patch, self._grid_size = model, config.patch, config.grid_size
        self._log_every, self._num_steps = config.runtime.log_every, num_steps
        self._look_every = -(-LOOK_EVERY // self._log_every) * self._log_every
        self._select_neighbors = backend(config.runtime.kernels).select_neighbors
        self._has_context = model.context_loss_weight > 0
        self._images_per_step = config.data.batch_size * config.runtime.accumulation
        self._measured = self._pooling = self._looking = False
        self._sums: list[Tensor] = []
        self._pooled: list[Tensor] = []
        self._targets: Tensor | None = None
        self._updates: list[Tensor] = []
        self._probe: Tensor | None = None
        self._neighbors: Tensor | None = None
        self._changed: Tensor | None = None
        model.teacher_encoder.register_forward_hook(self._keep_pooled)

    def start_step(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        done = step + 1
        self._measured = done % self._log_every == 0 or done == self._num_steps
        before_look = -done % self._look_every
        self._looking = before_look == 0
        self._pooling = before_look * self._images_per_step < NUM_SAMPLES
        self.measures = self._measured or self._pooling
        self._sums, self._updates, self._targets, self._changed = [], [], None, None
        if self._probe is None:
            # The teacher cannot be called by itself before the first step, in which FSDP2 finds its root.
            self._probe = micro_batches[0][0].clone()
        elif self._looking:
            self._look_at_neighbors()

    @torch.no_grad()
    def _look_at_neighbors(self) -> None:
        # Called before the step: what FSDP2 prefetches here is used by the step, with the same weights.
        window, count = self._patch.patch_k_size, self._patch.patch_k_num
        if window > min(self._grid_size):
            return
        assert self._probe is not None
        pooling, self._pooling = self._pooling, False
        h = self._model.teacher_encoder(self._probe)
        self._pooling = pooling
        patches = torch.arange(h.shape[0] * h.shape[1], device=h.device)
        now = self._select_neighbors(h, patches, self._grid_size, count, window, self._patch.border)
        if self._neighbors is not None:
            self._changed = count_changed(self._neighbors, now)
        self._neighbors = now

    def _keep_pooled(self, module: nn.Module, arguments: tuple[Any, ...], features: Tensor) -> None:
        if self._pooling:
            self._pooled.append(features.detach().float().mean(1))

    def see_batch(self, predictions: Predictions, targets: Tensor, masks: MaskBatch) -> None:
        if not self._measured:
            return
        num_patches = self._grid_size[0] * self._grid_size[1]
        hidden = targets[: len(masks.target_unique)]
        hidden_predictions = predictions.targets.detach()
        sums = sum_targets(hidden_predictions, hidden, masks.target_unique, masks.target_slot, num_patches)
        if predictions.context is not None:
            seen = targets[-masks.context_index.numel() :]
            sums = torch.cat([sums, sum_errors(predictions.context.detach(), seen, masks.context_slot())])
        self._sums.append(sums)
        if self._looking:
            self._targets = hidden[:: -(-len(hidden) // NUM_SAMPLES)].float()

    @contextmanager
    def see_update(self, weights: list[Tensor]) -> Iterator[None]:
        if not self._measured:
            yield
            return
        before = [weight.clone() for weight in weights]
        yield
        torch._foreach_sub_(before, weights)
        self._updates.append(torch.stack([_sum_squares(before), _sum_squares(weights)]))

    def take(self) -> Reading | None:
        """What was measured in the step that was just made, or None if it is not a logged one."""
        if not self._measured:
            return None
        update = torch.stack(self._updates).sum(0)
        changed = self._changed if self._changed is not None else update.new_zeros(2)
        sums = torch.cat([update, changed, torch.stack(self._sums).sum(0)])
        if not self._looking:
            return Reading(sums, self._has_context)
        assert self._targets is not None
        features = {"features": torch.cat(self._pooled)[-NUM_SAMPLES:], "targets": self._targets}
        self._pooled = []
        return Reading(sums, self._has_context, features)


def _sum_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()


def read_sums(sums: Sequence[float], has_context: bool) -> dict[str, float]:
    """The figures of `Reading.sums`, added over ranks: the relative norm of the update, and those of the targets.

    Returns:
        Figures by their names in `metrics.jsonl`. `neighbors/changed` only where a look was taken before.
    """
    update, weight, changed, neighbors, *rest = sums
    figures = {"train/update_norm": math.sqrt(update / weight) if weight > 0 else math.nan}
    if neighbors:
        figures["neighbors/changed"] = changed / neighbors
    if has_context:
        width = (len(rest) - NUM_PAIR_SUMS - 2 * NUM_ERROR_SUMS) // 2
        context = len(rest) - NUM_ERROR_SUMS - width
        figures["context/explained_variance"] = explained_variance(rest[context:])
        rest = rest[:context]
    return figures | {f"targets/{name}": value for name, value in read_targets(rest).items()}


def read_features(features: dict[str, Tensor]) -> dict[str, float]:
    """The figures of `Reading.features`. The host waits for the device."""
    return {
        f"{kind}/{name}": value
        for kind, tensor in features.items()
        for name, value in describe_features(tensor.cpu()).items()
    }
