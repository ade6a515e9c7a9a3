"""The masks of one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from dmtjepa.packing import PackedSequences, Packing


@dataclass(frozen=True)
class MaskBatch:
    """The masks of one batch of B images with N patches each.

    Patches are numbered in raster order: patch n = row * columns + column. A flat number counts over the whole batch:
    b * N + n. All tensors are int64 unless noted. The host knows all their sizes without waiting for the device.
    """

    context_index: torch.Tensor  # [B, C] patches that the student sees, ascending per image; packed: [1, L], flat
    target_index: torch.Tensor  # [B, M, T] patches of each target block, in raster order
    target_unique: torch.Tensor  # [U] flat numbers of the patches that a target block covers, ascending
    target_slot: torch.Tensor  # [B, M, T] position of each target patch in target_unique
    neighborhood: torch.Tensor  # [R] flat numbers of all patches in the windows around target_unique, ascending
    window: int  # side of these windows, in patches
    border: str  # `wrap`: these windows continue at the opposite edge of the grid; `clip`: they end at the edge
    context_packing: Packing | None = None  # with mask.pack: the layout of context_index, one sequence per image
    prediction_packing: PackedSequences | None = None  # with mask.pack: the sequences of the predictor

    @property
    def context_size(self) -> float:
        """Mean number of context patches per image."""
        return self.context_index.numel() / len(self.target_index)

    def contexts(self, num_patches: int) -> list[torch.Tensor]:
        """Return the context patches of each image: B tensors [C] with values 0 to N - 1. Waits for the device."""
        if self.context_packing is None:
            return list(self.context_index)
        return list((self.context_index[0] % num_patches).split(self.context_packing.lengths().tolist()))

    def flat_context(self, num_patches: int) -> torch.Tensor:
        """[V] flat numbers of the patches that the student sees, image by image."""
        if self.context_packing is not None:
            return self.context_index[0]
        first = torch.arange(len(self.context_index), device=self.context_index.device) * num_patches
        return (self.context_index + first[:, None]).flatten()

    def context_slot(self) -> torch.Tensor:
        """[B, M, C] place in `flat_context` of each prediction of a patch that the student sees; packed: [1, 1, P]."""
        if self.prediction_packing is not None:
            packed = self.prediction_packing
            return packed.token_index[:, None, packed.context]
        batch, num_blocks, _ = self.target_index.shape
        slot = torch.arange(self.context_index.numel(), device=self.context_index.device)
        return slot.view(batch, 1, -1).expand(-1, num_blocks, -1)

    def pin_memory(self) -> MaskBatch:
        """Copy the masks to page-locked memory, so that copies to the GPU can be asynchronous. Needs CUDA."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MaskBatch:
        """Copy the masks to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Do not reuse the memory of any tensor before `stream` has finished the work queued on it so far."""

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MaskBatch:
        def apply(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            if isinstance(value, tuple):
                return type(value)(*map(apply, value))
            return value

        return MaskBatch(*(apply(getattr(self, field.name)) for field in fields(self)))
