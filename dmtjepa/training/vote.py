"""Ranks decide together what to do next."""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.distributed as dist


class Vote(IntEnum):
    """What a rank wants to do next. The highest vote wins."""

    CONTINUE = 0
    COLLAPSED = 1
    STOP = 2
    FAIL = 3


class RankVote:
    """Makes all ranks act on the same vote at the same step, without making any of them wait.

    Votes travel over gloo between the hosts while the next step runs: a vote cast in one round is known to all ranks in
    the next.

    Args:
        group: a gloo process group of all ranks that nothing else uses.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._value = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def cast(self, vote: Vote) -> Vote:
        """Send the vote of this rank. Returns the highest vote of the previous round, the same on all ranks."""
        result = self.finish()
        self._value = torch.tensor([int(vote)])
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return result

    def finish(self) -> Vote:
        """The highest vote of the last round. Waits for it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Vote(int(self._value))
