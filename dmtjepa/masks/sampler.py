"""Multi-block masks: which patches the student sees (the context) and which it predicts (M target blocks per image).

One target block size and one context block size hold for a whole step; positions differ per image. The context of an
image is its context block without the patches of its target blocks, cut to the shortest context of the batch, so that
every shape is constant over it. With `pack` nothing is cut, and contexts of different lengths lie one after the other.
Two samplers:

`released`   the distribution of the published I-JEPA and DMT-JEPA code, which published results were trained with: one
             random number sets both area and aspect of a block; a block is smaller than the grid and never touches the
             last row or column; contexts keep their first patches in raster order; after 20 context blocks in a row
             that left too few patches, the last target block is no longer kept out of the context, and so on until one
             fits.
`corrected`  area and aspect are independent; a block can be anywhere and as large as the grid; contexts keep a random
             subset; an image whose context is too short gets new targets too, so that no context ever holds a target.

All randomness comes from a counter-based generator, addressed by (seed, step, attempt, image): nothing is raced or
carried from step to step, and an image of the global batch has the same blocks on whichever rank it is.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from dmtjepa.config import MaskSettings
from dmtjepa.masks.batch import MaskBatch
from dmtjepa.masks.geometry import overlay_blocks
from dmtjepa.masks.placement import CUT, draw_sizes, place_blocks, random_words
from dmtjepa.packing import pack, pack_predictions


def sample_masks(
    settings: MaskSettings,
    grid_size: tuple[int, int],
    batch_size: int,
    seed: int,
    step: int,
    rank: int,
    world_size: int = 1,
    *,
    window: int = 3,
    border: Literal["wrap", "clip"] = "wrap",
) -> MaskBatch:
    """The masks of one rank at one step: a pure function of its arguments.

    Args:
        settings: the `mask` section.
        grid_size: rows and columns of the patch grid.
        batch_size: images of this rank, B. Image b is number rank * B + b of the global batch, and draws by that.
        seed, step: of the run; block sizes depend on these alone, so they agree on all ranks.
        rank, world_size: which slice of the global batch. world_size matters for context_cut "global" alone, which cuts
            contexts to the shortest of all world_size * B images instead of this rank's. With `pack` none is cut.
        window: side of the neighbourhood around a target patch, odd.
        border: "wrap" takes windows round the grid, "clip" leaves out what is outside of it.

    Returns:
        MaskBatch on the CPU.

    Raises:
        MaskError: the blocks of this step are too small for min_keep, or the corrected sampler found no valid blocks in
            MAX_ATTEMPTS attempts. `check_masks` tells beforehand.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: {window} is not a positive odd number")
    if border not in ("wrap", "clip"):
        raise ValueError(f"border: {border!r} is neither 'wrap' nor 'clip'")
    everyone = settings.context_cut == "global" and not settings.pack
    if rank < 0 or (everyone and rank >= world_size):
        raise ValueError(f"rank: {rank} is outside of a world of {world_size}")

    num_targets = settings.num_pred_masks
    num_patches = grid_size[0] * grid_size[1]
    # The images whose contexts are compared, and those of this rank among them.
    first, count = (0, world_size * batch_size) if everyone else (rank * batch_size, batch_size)
    mine = slice(rank * batch_size - first, (rank + 1) * batch_size - first)

    target_size, context_size = draw_sizes(settings, grid_size, seed, step)
    sizes = [target_size] * num_targets + [context_size]
    top, left, overlay, context = place_blocks(settings, grid_size, sizes, seed, step, first, count)
    top, left, overlay = top[:num_targets, mine], left[:num_targets, mine], overlay[mine]
    num_kept = int(np.count_nonzero(context, axis=1).min())
    context = context[mine]

    packings = ()
    if settings.pack:
        context_index = np.flatnonzero(context)[None]
        length = np.count_nonzero(context, axis=1)
        packings = pack(length), pack_predictions(length, num_targets, math.prod(target_size))
    elif settings.sampler == "released":
        context_index = first_patches(context, num_kept)
    else:
        words = random_words(seed, step, CUT, 0, rank * batch_size * num_patches, batch_size * num_patches)
        context_index = random_patches(context, num_kept, words.reshape(batch_size, num_patches))

    offset = np.arange(target_size[0])[:, None] * grid_size[1] + np.arange(target_size[1])
    corner = np.ascontiguousarray((top * grid_size[1] + left).T)  # [B, M]
    target_index = corner[:, :, None] + offset.ravel()
    target_unique = np.flatnonzero((overlay & ((1 << num_targets) - 1)) != 0)
    slot = np.empty(batch_size * num_patches, np.int64)
    slot[target_unique] = np.arange(len(target_unique))
    target_slot = slot[target_index + np.arange(0, batch_size * num_patches, num_patches)[:, None, None]]

    # The union of the windows around the patches of a block is that block, enlarged by half a window on all sides.
    margin = window // 2
    size = (target_size[0] + 2 * margin, target_size[1] + 2 * margin)
    enlarged = overlay_blocks(top - margin, left - margin, [size] * num_targets, grid_size, wrap=border == "wrap")
    neighborhood = np.flatnonzero(enlarged != 0)

    arrays = (context_index, target_index, target_unique, target_slot, neighborhood)
    return MaskBatch(*map(torch.from_numpy, arrays), *packings)


def first_patches(context: np.ndarray, num_kept: int) -> np.ndarray:
    """[B, num_kept] int64: the first True places of each row of context [B, N]."""
    num_images, num_patches = context.shape
    start = np.arange(num_images)[:, None] * num_patches
    flat = np.flatnonzero(context)
    return flat[np.searchsorted(flat, start) + np.arange(num_kept)] - start


def random_patches(context: np.ndarray, num_kept: int, words: np.ndarray) -> np.ndarray:
    """[B, num_kept] int64: a uniformly random subset of the True places of each row of context [B, N], ascending.

    words: [B, N] uint64, random. Those places are kept whose words are smallest.
    """
    num_images, num_patches = context.shape
    # The place itself in the lowest bits makes all words of a row different.
    index_bits = num_patches.bit_length()
    order = (words >> index_bits << index_bits) + np.arange(num_patches, dtype=np.uint64)
    order[~context] = np.iinfo(np.uint64).max
    last = np.partition(order, num_kept - 1, axis=1)[:, num_kept - 1 : num_kept]
    kept = np.flatnonzero(order <= last).reshape(num_images, num_kept)
    return kept - np.arange(num_images)[:, None] * num_patches
