"""Sequences of different lengths, concatenated so that nothing is computed for padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packing(NamedTuple):
    """The layout of S concatenated sequences with L elements in total."""

    start: Tensor  # [S + 1] int32, the first element of each sequence, then L
    sequence: Tensor  # [L] int64, the sequence of each element
    padded: Tensor  # [S, longest] int64, the elements of each sequence, repeated up to the longest length

    # Methods, because Dynamo of PyTorch 2.10 does not trace properties of a named tuple.
    def lengths(self) -> Tensor:
        """[S] int32, the length of each sequence."""
        return self.start[1:] - self.start[:-1]

    def present(self) -> Tensor:
        """[S, longest] bool, False for the repeated elements in `padded`."""
        place = torch.arange(self.padded.shape[1], device=self.padded.device)
        return place < self.lengths()[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """Pad [1, L, ...] -> [S, longest, ...] by repeating each sequence. `present` marks the first occurrences."""
        return x[0].index_select(0, self.padded.flatten()).unflatten(0, self.padded.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """Undo `pad`: [S, longest, ...] -> [1, L, ...]."""
        place = torch.arange(len(self.sequence), device=x.device) - self.start[self.sequence]
        return x.flatten(0, 1).index_select(0, self.sequence * x.shape[1] + place)[None]


class PackedSequences(NamedTuple):
    """The predictor's sequences: for each image and target block, the image's context and the block's T patches."""

    packing: Packing  # of the B*M sequences
    token_index: Tensor  # [1, L] int64, the token of each element; tokens are all contexts, then all target blocks
    target: Tensor  # [B*M*T] int64, the elements that are target patches
    context: Tensor  # [L - B*M*T] int64, the others: each image's context, once for each of its blocks


def pack(length: np.ndarray) -> Packing:
    """Return the packing of sequences with lengths [S], all at least 1, on the CPU."""
    start = np.concatenate([[0], np.cumsum(length)])
    sequence = np.repeat(np.arange(len(length)), length)
    padded = start[:-1, None] + np.arange(length.max()) % length[:, None]
    return Packing(*map(torch.from_numpy, (start.astype(np.int32), sequence, padded)))


def pack_predictions(length: np.ndarray, num_blocks: int, num_targets: int) -> PackedSequences:
    """Return the sequences of images with contexts of lengths [B] and M blocks of T patches, on the CPU."""
    packing = pack(np.repeat(length + num_targets, num_blocks))
    start, sequence = packing.start.numpy().astype(np.int64), packing.sequence.numpy()
    place = np.arange(start[-1]) - start[sequence]
    image = sequence // num_blocks
    in_context = (np.cumsum(length) - length)[image] + place
    in_blocks = length.sum() + sequence * num_targets + place - length[image]
    is_context = place < length[image]
    index = np.where(is_context, in_context, in_blocks)
    target, context = np.flatnonzero(~is_context), np.flatnonzero(is_context)
    return PackedSequences(packing, *map(torch.from_numpy, (index[None], target, context)))
