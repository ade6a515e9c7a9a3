"""The masks of one batch, as the model takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from dmtjepa.packing import PackedSequences, Packing


@dataclass(frozen=True)
class MaskBatch:
    """The masks of one batch. Patches are numbered in raster order, n = row * cols + col; flat is b * N + n.

    All tensors are int64, if not said otherwise. Their sizes are known without any synchronisation.
    """

    context_index: torch.Tensor  # [B, C] patches that the student sees, ascending in each image; packed: [1, L], flat
    target_index: torch.Tensor  # [B, M, T] patches of each target block, in raster order
    target_unique: torch.Tensor  # [U] flat patches that some target block of their image covers, ascending
    target_slot: torch.Tensor  # [B, M, T] place of each target patch in target_unique
    neighborhood: torch.Tensor  # [R] flat patches in the windows around target_unique, themselves included, ascending
    context_packing: Packing | None = None  # with mask.pack: where each image's patches lie in context_index
    prediction_packing: PackedSequences | None = None  # with mask.pack: what the predictor makes of them

    @property
    def context_size(self) -> float:
        """Context patches per image, in the mean."""
        return self.context_index.numel() / len(self.target_index)

    def contexts(self, num_patches: int) -> list[torch.Tensor]:
        """The context patches of each image, [C] of 0 to N - 1, for looking at them: the host waits for the device."""
        if self.context_packing is None:
            return list(self.context_index)
        return list((self.context_index[0] % num_patches).split(self.context_packing.length.tolist()))

    def pin_memory(self) -> MaskBatch:
        """The same masks in page-locked memory, for copies that do not wait. Needs CUDA."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MaskBatch:
        """The same masks on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all tensors until `stream` has done what it is given before they are dropped."""
        self._map(lambda tensor: tensor.record_stream(stream))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MaskBatch:
        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return type(value)(*map(apply, value))
            return None if value is None else function(value)

        return MaskBatch(*(apply(getattr(self, field.name)) for field in fields(self)))
