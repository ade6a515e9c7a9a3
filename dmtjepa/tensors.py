"""Sharded tensors: the shards of this rank, and the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the shard of this rank for each sharded tensor (DTensor); ordinary tensors stay as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather each sharded tensor (DTensor) on all ranks, which must call this alike; others stay as they are."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
