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
from dmtjepa.errors import UserError
from dmtjepa.evaluation.errors import EvaluationError, EvaluationStopped
from dmtjepa.evaluation.splits import Subset

T = TypeVar("T")

SURVIVED = (UserError, RuntimeError, OSError, MemoryError)
"""What images, memory and numbers can cause: `torch.OutOfMemoryError` and `LinAlgError` are RuntimeErrors. Training
goes on without what failed. Any other error is a mistake in the program, and ends the run."""
LESS_MEMORY = "a lower evaluation.batch_size or evaluation.max_images needs less"


@dataclass(frozen=True)
class Failure:
    """Stands for a result that a rank could not compute. The reason is a message for the user."""

    reason: str

    @classmethod
    def from_error(cls, error: BaseException) -> Failure:
        kind = type(error).__name__.lstrip("_")
        reason = str(error) if isinstance(error, UserError) else f"{kind}: {error}".rstrip(": ")
        lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        return cls(f"{reason}; {LESS_MEMORY}" if lacks_memory else reason)


@dataclass(frozen=True)
class Ranks:
    """The processes that share an evaluation. All of them call each method alike, in the same order.

    A rank that left alone, because of an error or a stop signal, would leave the others waiting in an exchange. So
    everything that can fail or last on one rank is passed to `together` or `run`. They end it early or catch its error,
    tell all ranks, and all ranks raise alike. Code between these calls must find the same on all ranks.

    group: a gloo process group of all ranks that nothing else uses at the same time; None for a process alone.
    is_stopped: whether this rank was asked to stop. Once true, it stays true.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    is_stopped: Callable[[], bool] = lambda: False

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

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T | Failure]:
        """The results of all tasks, on all ranks. Each rank runs those that it owns.

        Returns:
            For a task that raised one of `SURVIVED`, a `Failure`.

        Raises:
            EvaluationStopped: on all ranks, if one was asked to stop.
        """
        mine = [self._attempt(task) for number, task in enumerate(tasks) if self.owner(number) == self.rank]
        results = self._settle(mine)
        return [results[self.owner(number)][number // self.count] for number in range(len(tasks))]

    def together(self, work: Callable[[], T]) -> T:
        """Do work on every rank, and return the result of this one. The work may end early if `is_stopped`.

        Raises:
            EvaluationError: on all ranks, with the reason of the lowest one on which the work raised one of `SURVIVED`.
            EvaluationStopped: on all ranks, if one was asked to stop.
        """
        result = self._attempt(work)
        failures = self._settle(result if isinstance(result, Failure) else None)
        for failure in failures:
            if failure is not None:
                raise EvaluationError(failure.reason)
        assert not isinstance(result, Failure)
        return result

    def _attempt(self, work: Callable[[], T]) -> T | Failure:
        """The result of work on this rank. After a stop signal, nothing is begun: `_settle` tells the others."""
        if self.is_stopped():
            return Failure("asked to stop")
        try:
            return work()
        except SURVIVED as error:
            return Failure.from_error(error)

    def _settle(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks. Raises EvaluationStopped on all if one was asked to stop."""
        settled = self.exchange((self.is_stopped(), value))
        if any(is_stopped for is_stopped, _ in settled):
            raise EvaluationStopped
        return [value for _, value in settled]
