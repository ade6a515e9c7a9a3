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
