"""Benchmark cases of operators.

The module of an operator defines `cases(workload, device, dtype)`. A case is one operator call with its arguments, its
implementations, a reference, and the bytes that it must move: every input element that is needed is read once, every
output element is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from dmtjepa.masks import MaskBatch


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||; NaN where the output has a NaN."""
    output, reference = output.double(), reference.double()
    return float((output - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclass
class Case:
    """One call of an operator, `launch(*arguments)`, and what it is compared with, called alike.

    Every result is compared with that of `reference` by `error(output, reference)`, which must stay below `limit`.
    """

    name: str
    arguments: tuple
    launch: Callable
    cpu: Callable
    plain: Callable
    reference: Callable
    unique_bytes: int
    limit: float
    error: Callable[[object, object], float] = relative_error

    def provider(self, name: str) -> Callable:
        """One implementation: `triton`, `cpu`, `eager` or `compile`."""
        if name == "compile":  # dynamic=False: the best code torch.compile has for exactly this shape
            return torch.compile(self.plain, fullgraph=True, dynamic=False)
        return {"triton": self.launch, "cpu": self.cpu, "eager": self.plain}[name]


def rounding(dtype: torch.dtype) -> float:
    """A relative error well above the dtype's rounding and well below a mistake."""
    return 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def in_float32(function: Callable) -> Callable:
    """`function` with its floating-point arguments cast to float32."""

    def reference(*arguments: object) -> object:
        return function(*(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments))

    return reference


def draw_neighbors(masks: MaskBatch, workload: Workload) -> Tensor:
    """Four random ones of the eight patches around each covered patch, as indices [U, 4] into the neighbourhood."""
    device, num_covered = masks.target_unique.device, len(masks.target_unique)
    rows, cols = workload.grid_size
    steps = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)], device=device)
    step = steps[torch.rand(num_covered, 8, device=device).argsort(1)[:, :4]]
    n = (masks.target_unique % workload.num_patches)[:, None]
    first = masks.target_unique[:, None] - n
    neighbor = first + (n // cols + step[..., 0]) % rows * cols + (n % cols + step[..., 1]) % cols
    place = torch.zeros(workload.batch_size * workload.num_patches, dtype=torch.int64, device=device)
    place[masks.neighborhood] = torch.arange(len(masks.neighborhood), device=device)
    return place[neighbor]
