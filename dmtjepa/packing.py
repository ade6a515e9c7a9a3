"""Sequences of different lengths, one after the other, so that nothing is computed for the places that are missing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where S sequences lie, L elements in all."""

    start: Tensor  # [S + 1] int32, where each sequence begins; the last is L
    sequence: Tensor  # [L] int64, the sequence of each element
    padded: Tensor  # [S, longest] int64, the elements of each sequence, over again where there are no more

    @property
    def length(self) -> Tensor:
        """[S] int32, of each sequence."""
        return self.start[1:] - self.start[:-1]

    @property
    def present(self) -> Tensor:
        """[S, longest] bool, which places of `padded` are no repetition."""
        place = torch.arange(self.padded.shape[1], device=self.padded.device)
        return place < self.length[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """[1, L, ...] -> [S, longest, ...]; what is beyond a sequence's end (see `present`) repeats it."""
        return x[0].index_select(0, self.padded.flatten()).unflatten(0, self.padded.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """[S, longest, ...] -> [1, L, ...]."""
        place = torch.arange(len(self.sequence), device=x.device) - self.start[self.sequence]
        return x.flatten(0, 1).index_select(0, self.sequence * x.shape[1] + place)[None]


class PackedSequences(NamedTuple):
    """The sequences of a predictor: for each image and target block the image's context, then the block's T patches."""

    packing: Packing  # of the B*M sequences
    index: Tensor  # type: ignore[assignment]  # [1, L] int64, their elements: rows of all contexts' patches, followed by all blocks' patches
    target: Tensor  # [B*M*T] int64, where the blocks' patches are among these elements


def pack(length: np.ndarray) -> Packing:
    """The packing of sequences of these lengths, [S], all at least 1; on the CPU."""
    start = np.concatenate([[0], np.cumsum(length)])
    sequence = np.repeat(np.arange(len(length)), length)
    padded = start[:-1, None] + np.arange(length.max()) % length[:, None]
    return Packing(*map(torch.from_numpy, (start.astype(np.int32), sequence, padded)))


def pack_predictions(length: np.ndarray, num_blocks: int, num_targets: int) -> PackedSequences:
    """The sequences of images with contexts of these lengths, [B], and M blocks of T patches; on the CPU."""
    packing = pack(np.repeat(length + num_targets, num_blocks))
    start, sequence = packing.start.numpy().astype(np.int64), packing.sequence.numpy()
    place = np.arange(start[-1]) - start[sequence]
    image = sequence // num_blocks
    in_context = (np.cumsum(length) - length)[image] + place
    in_blocks = length.sum() + sequence * num_targets + place - length[image]
    index = np.where(place < length[image], in_context, in_blocks)
    target = start[1:, None] - num_targets + np.arange(num_targets)
    return PackedSequences(packing, torch.from_numpy(index[None]), torch.from_numpy(target.ravel()))
