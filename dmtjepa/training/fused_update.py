"""AdamW, the teacher's average and the weights in the dtype of the computation, updated in one pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dmtjepa.kernels.update_weights import Weight, WeightTable, update_weights
from dmtjepa.objective import DMTJEPA
from dmtjepa.tensors import local_tensors
from dmtjepa.training import optimizer as optimizers
from dmtjepa.training.optimizer import ShardedAdamW, clipping_scale
from dmtjepa.training.parallelize import weight_copies


class FusedUpdate:
    """The end of a step: it clips the gradient and updates student, teacher and kept copies of their weights.

    On a GPU, one kernel reads and writes each number once (`dmtjepa.kernels.update_weights`). The result is that of
    `clip_gradients`, `ShardedAdamW.step` and `DMTJEPA.update_teacher` up to rounding. AdamW's averages and the number
    of updates stay in `optimizer.state`, so that a run may change between both ways when it is resumed.

    Args:
        model: sharded (`parallelize`), or with copies that are kept.
        optimizer: of the student's parameters.
        device: where the shards of this rank are.
    """

    def __init__(self, model: DMTJEPA, optimizer: ShardedAdamW, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._parameters: list[nn.Parameter] = []
        self._table: WeightTable | None = None
        self._count = torch.zeros((), device=device)
        self._no_clipping = torch.ones((), device=device)
        self._schedule = torch.zeros(3, dtype=torch.float64, device=device)

    @property
    def table(self) -> WeightTable:
        """Where the weights lie. There is none before the first backward pass."""
        if self._table is None:
            self._table = self._build_table()
        return self._table

    def set_rates(self, learning_rate: float, decay: float, momentum: float) -> None:
        """Set learning rate, weight decay and the teacher's momentum of the next update."""
        rates = torch.tensor(
            [learning_rate, decay, 1.0 - momentum], dtype=torch.float64, pin_memory=self._device.type == "cuda"
        )
        self._schedule.copy_(rates, non_blocking=True)

    @torch.no_grad()
    def __call__(
        self, norm: Tensor, max_norm: float | None, watch: Callable[[list[Tensor]], AbstractContextManager[None]]
    ) -> None:
        """Update all weights and clear their gradients. The student stays as it is if `norm` is not finite.

        Args:
            norm: of the whole gradient, a float32 scalar on the device (`gradient_norm`).
            max_norm: the gradient is scaled so that its norm is at most this; None: it is not scaled.
            watch: as for `ShardedAdamW.step`; the weights of the teacher that is updated with them are not among them.
        """
        table = self.table
        gradients = [parameter.grad for parameter in self._parameters]
        table.set_gradients([_local(gradient) for gradient in gradients])
        scale = self._no_clipping if max_norm is None else clipping_scale(norm, max_norm)
        found_inf = (~norm.isfinite()).float()
        self._count += 1.0 - found_inf
        weights = [weight.weight for weight in table.weights]
        for part in optimizers.split(weights, optimizers.UPDATED_BYTES):
            trained = [weight.weight for weight in table.weights[part] if weight.average is not None]
            with watch(trained):
                update_weights(table, self._schedule, self._count, scale, found_inf, part)
        table.clear_gradients()
        self._optimizer.zero_grad()

    def _build_table(self) -> WeightTable:
        """Called after the first backward pass, when the copies exist. All parameters share one number of updates."""
        teachers = {student: teacher for teacher, student in self._model.teacher_pairs()}
        copies = weight_copies(self._model)
        decayed = {p: group["decayed"] for group in self._optimizer.param_groups for p in group["params"]}
        # Those that are not trained are averaged all the same.
        self._parameters = [*decayed, *(student for student in teachers if student not in decayed)]
        if steps := [self._optimizer.state[p]["step"] for p in decayed if self._optimizer.state[p]]:
            self._count.copy_(steps[0])  # of a checkpoint
        weights = []
        for parameter in self._parameters:
            row = self._optimizer.state[parameter] if parameter in decayed else {}
            if parameter in decayed and not row:
                row |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if row:
                row["step"] = self._count
            teacher = teachers.get(parameter)
            weights.append(
                Weight(
                    local_tensors([parameter])[0],
                    _local(row.get("exp_avg")),
                    _local(row.get("exp_avg_sq")),
                    decayed.get(parameter, False),
                    _local(teacher),
                    copies.get(parameter),
                    copies.get(teacher) if teacher is not None else None,
                )
            )
        return WeightTable(weights)


def _local(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else local_tensors([tensor])[0]
