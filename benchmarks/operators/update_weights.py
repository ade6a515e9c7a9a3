"""update_weights on the weights of one block of the encoder, with teacher and copies.

Unique bytes: weight, gradient, both averages and teacher are read; all but the gradient, and two copies, are written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.operators.cases import Case, relative_error
from benchmarks.workloads import Workload
from dmtjepa.kernels.update_weights import (
    Weight,
    WeightTable,
    launch_update_weights,
    update_weights_cpu,
    update_weights_reference,
)
from dmtjepa.models.layers import Block


def flatten(weights: Iterable[Weight]) -> list[Tensor]:
    """All tensors that an update writes."""
    return [tensor for weight in weights for tensor in weight.tensors() if tensor is not None]


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    with torch.device("meta"):
        block = Block(workload.dim, workload.num_heads, 4.0, nn.Identity())
    weights, gradients = [], []
    for parameter in block.parameters():
        weight, gradient, teacher = (torch.randn(parameter.shape, device=device) for _ in range(3))
        copies = [torch.empty_like(weight, dtype=dtype) for _ in range(2)]
        decayed = parameter.ndim > 1
        weights.append(Weight(weight, 0.1 * gradient, 0.01 * gradient.square(), decayed, teacher, *copies))
        gradients.append(gradient)
    initial = copy.deepcopy(weights)  # the table's change with each call
    table = WeightTable(weights)
    table.set_gradients(gradients)
    schedule = torch.tensor([0.1, 0.05, 0.1], dtype=torch.float64, device=device)
    scalars = (schedule, *(torch.tensor(value, device=device) for value in (3.0, 0.5, 0.0)))

    def in_table(update: Callable[..., None]) -> Callable[..., list[Tensor]]:
        def run(*scalars: Tensor) -> list[Tensor]:
            update(table, *scalars)
            return flatten(weights)

        return run

    def plain(*scalars: Tensor) -> list[Tensor]:
        pairs = zip(initial, gradients, strict=True)
        return flatten(update_weights_reference(weight, gradient, *scalars) for weight, gradient in pairs)

    return [
        Case(
            "update_weights",
            scalars,
            in_table(launch_update_weights),
            in_table(update_weights_cpu),
            plain,
            plain,
            sum((36 + 2 * dtype.itemsize) * weight.weight.numel() for weight in weights),
            1e-3,
            lambda output, expected: max(map(relative_error, output, expected)),
        )
    ]
