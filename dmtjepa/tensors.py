"""Access to the local shards of sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the shard of this rank for each sharded tensor (DTensor); ordinary tensors stay as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
