"""Dividing an evaluation over the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.splits import Subset

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share an evaluation. All of them call each method alike, in the same order.

    group: a gloo process group of all ranks that nothing else uses at the same time; None for a process alone.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def take_part(self, source: ImageSource) -> Subset:
        """The images of this rank. The parts of all ranks, one after another, are the source."""
        return Subset(source, np.array_split(np.arange(len(source)), self.count)[self.rank])

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all ranks, on all ranks, see `gather_on`. For small tensors, such as labels."""
        joined = [rows for rows in self.exchange(torch.cat(list(parts)) if parts else None) if rows is not None]
        return torch.cat(joined) if joined else torch.empty(0)

    def gather_on(self, owner: int, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all ranks in the order of the ranks, on the rank `owner`; nothing on the others.

        Args:
            parts: rows [n,...] on the CPU, one after another. Their dtype and dimensions but n are the same everywhere.
        """
        mine = torch.cat(list(parts)) if parts else None
        if self.group is None:
            return torch.empty(0) if mine is None else mine
        shapes = self.exchange(None if mine is None else (mine.shape, mine.dtype))
        known = [shape for shape in shapes if shape is not None]
        if not known:
            return torch.empty(0)
        counts = [0 if shape is None else shape[0][0] for shape in shapes]
        padded = torch.zeros(max(counts), *known[0][0][1:], dtype=known[0][1])
        if mine is not None:
            padded[: len(mine)] = mine
        received = [torch.empty_like(padded) for _ in counts] if self.rank == owner else None
        dist.gather(padded, received, dst=owner, group=self.group)
        if received is None:
            return torch.empty(0)
        return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])

    def owner(self, task: int) -> int:
        """The rank that a task belongs to."""
        return task % self.count

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all tasks, on all ranks. Each rank runs those that it owns."""
        mine = [task() for number, task in enumerate(tasks) if self.owner(number) == self.rank]
        results = self.exchange(mine)
        return [results[self.owner(number)][number // self.count] for number in range(len(tasks))]
