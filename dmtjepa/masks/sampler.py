"""The mask sampler: a pure function from (step, shard) to the masks of a batch.

All images of a step have target blocks of one size and context blocks of one size; the positions differ. The context
of an image is its context block without its target blocks, cut to the shortest context of the batch, so that tensors
have one shape. With `mask.pack` no context is cut; contexts of different lengths are concatenated. There are two
samplers:

`released`   reproduces the official I-JEPA and DMT-JEPA code, which trained the models of the papers. One random number
             sets both area and aspect ratio of a target block. A block is smaller than the grid and never covers
             the last row or column. Contexts keep their first patches in raster order. After 20 consecutive context
             blocks that leave too few patches, the context may overlap the last target block; after 20 more, the last
             two; and so on.
`corrected`  draws area and aspect ratio independently. Blocks can be anywhere and as large as the grid. Contexts keep a
             random subset of their patches. An image whose context is too short gets new target blocks, too, so that a
             context never overlaps a target.

Random numbers come from a counter-based generator that is addressed by (seed, step, attempt, image). No state is
carried from step to step, and an image of the global batch has the same blocks on any rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dmtjepa.config import Config, MaskSettings
from dmtjepa.masks.batch import MaskBatch
from dmtjepa.masks.geometry import overlay_blocks
from dmtjepa.masks.placement import CUT, draw_sizes, place_blocks, random_words
from dmtjepa.packing import PackedSequences, Packing, pack, pack_predictions


@dataclass(frozen=True)
class MaskSampler:
    """Samples the masks of a run.

    Args:
        settings: the `mask` section.
        grid_size: rows and columns of the patch grid.
        batch_size: images per shard, B.
        seed: seed of the run.
        window: side of the window around a target patch from which its neighbours are chosen; odd. The aggregation
            head of the model must have the same window and border.
        border: `wrap` continues windows at the opposite edge of the grid, `clip` ends them at the edge.
    """

    settings: MaskSettings
    grid_size: tuple[int, int]
    batch_size: int
    seed: int = 0
    window: int = 3
    border: Literal["wrap", "clip"] = "wrap"

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window: {self.window} is not a positive odd number")
        if self.border not in ("wrap", "clip"):
            raise ValueError(f"border: {self.border!r} is neither 'wrap' nor 'clip'")

    @classmethod
    def from_config(cls, config: Config, *, batch_size: int | None = None, seed: int | None = None) -> MaskSampler:
        """Build the sampler of a run. `batch_size` and `seed` replace those of the configuration."""
        return cls(
            config.mask,
            config.grid_size,
            config.data.batch_size if batch_size is None else batch_size,
            config.runtime.seed if seed is None else seed,
            config.patch.patch_k_size,
            config.patch.border,
        )

    def sample(self, step: int, shard: int = 0, num_shards: int = 1) -> MaskBatch:
        """Sample the masks of one shard of the global batch at one step. A pure function of its arguments.

        Args:
            step: block sizes depend on seed and step only, so that they are the same for all shards.
            shard: which B images of the global batch: image b is number shard * B + b. With W ranks, micro-batch a on
                rank r is shard a * W + r.
            num_shards: shards of the global batch. The masks depend on it only with `mask.context_cut: global`, which
                cuts contexts to the shortest of the global batch instead of the shard.

        Returns:
            MaskBatch on the CPU.

        Raises:
            MaskError: the blocks of this step are too small for min_keep, or the corrected sampler found no valid
                blocks. `check_masks` finds out before training.
        """
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard: {shard} is not in the range of {num_shards} shards")
        num_targets, num_patches = self.settings.num_pred_masks, math.prod(self.grid_size)
        # The images whose contexts are compared, and the images of this shard among them.
        first, count = shard * self.batch_size, self.batch_size
        if self.settings.context_cut == "global" and not self.settings.pack:
            first, count = 0, num_shards * self.batch_size
        own = slice(shard * self.batch_size - first, (shard + 1) * self.batch_size - first)

        target_size, context_size = draw_sizes(self.settings, self.grid_size, self.seed, step)
        sizes = [target_size] * num_targets + [context_size]
        top, left, overlay, context = place_blocks(self.settings, self.grid_size, sizes, self.seed, step, first, count)
        num_kept = int(np.count_nonzero(context, axis=1).min())
        top, left, overlay, context = top[:num_targets, own], left[:num_targets, own], overlay[own], context[own]
        context_index, packings = self._index_context(context, num_kept, math.prod(target_size), step, shard)

        offset = np.arange(target_size[0])[:, None] * self.grid_size[1] + np.arange(target_size[1])
        corner = np.ascontiguousarray((top * self.grid_size[1] + left).T)  # [B, M]
        target_index = corner[:, :, None] + offset.ravel()
        target_unique = np.flatnonzero((overlay & ((1 << num_targets) - 1)) != 0)
        slot = np.empty(self.batch_size * num_patches, np.int64)
        slot[target_unique] = np.arange(len(target_unique))
        target_slot = slot[target_index + np.arange(0, self.batch_size * num_patches, num_patches)[:, None, None]]

        context_packing, prediction_packing = packings
        return MaskBatch(
            context_index=torch.from_numpy(context_index),
            target_index=torch.from_numpy(target_index),
            target_unique=torch.from_numpy(target_unique),
            target_slot=torch.from_numpy(target_slot),
            neighborhood=torch.from_numpy(self._find_neighborhood(top, left, target_size)),
            window=self.window,
            border=self.border,
            context_packing=context_packing,
            prediction_packing=prediction_packing,
        )

    def _find_neighborhood(self, top: np.ndarray, left: np.ndarray, target_size: tuple[int, int]) -> np.ndarray:
        """Return `neighborhood` of the target blocks whose upper left patches are top, left [M, B]."""
        # The union of the windows around the patches of a block is the block, enlarged by half a window on all sides.
        margin = self.window // 2
        enlarged_size = (target_size[0] + 2 * margin, target_size[1] + 2 * margin)
        enlarged = overlay_blocks(
            top - margin, left - margin, [enlarged_size] * len(top), self.grid_size, wrap=self.border == "wrap"
        )
        return np.flatnonzero(enlarged != 0)

    def _index_context(
        self, context: np.ndarray, num_kept: int, target_area: int, step: int, shard: int
    ) -> tuple[np.ndarray, tuple[Packing | None, PackedSequences | None]]:
        """Return `context_index` and the two packings of context [B, N], bool."""
        if self.settings.pack:
            length = np.count_nonzero(context, axis=1)
            packings = pack(length), pack_predictions(length, self.settings.num_pred_masks, target_area)
            return np.flatnonzero(context)[None], packings
        if self.settings.sampler == "released":
            return _first_patches(context, num_kept), (None, None)
        words = random_words(self.seed, step, CUT, 0, shard * context.size, context.size)
        return _random_patches(context, num_kept, words.reshape(context.shape)), (None, None)


def mean_context_sizes(config: Config, num_shards: int = 1, num_steps: int = 32) -> tuple[float, float]:
    """Count context patches per image: as a run has them, and whole, as with `mask.pack`.

    Without `mask.pack`, contexts are cut to the shortest of a batch.

    Args:
        num_shards: of the global batch, see `MaskSampler.sample`.
        num_steps: the first steps, over whose first shard the counts are averaged.

    Returns:
        The two means. They are equal with `mask.pack`.

    Raises:
        MaskError: as `MaskSampler.sample`.
    """

    def mean(sampler: MaskSampler) -> float:
        return sum(sampler.sample(step, 0, num_shards).context_size for step in range(num_steps)) / num_steps

    sampler = MaskSampler.from_config(config)
    whole = mean(replace(sampler, settings=config.mask.model_copy(update={"pack": True})))
    return whole if config.mask.pack else mean(sampler), whole


def _first_patches(context: np.ndarray, num_kept: int) -> np.ndarray:
    """Return the first num_kept True places of each row of context [B, N]: [B, num_kept] int64."""
    num_images, num_patches = context.shape
    start = np.arange(num_images)[:, None] * num_patches
    flat = np.flatnonzero(context)
    return flat[np.searchsorted(flat, start) + np.arange(num_kept)] - start


def _random_patches(context: np.ndarray, num_kept: int, words: np.ndarray) -> np.ndarray:
    """Return num_kept uniformly random True places of each row of context [B, N], ascending: [B, num_kept] int64.

    `words` [B, N] are random uint64. The places with the smallest words are kept.
    """
    num_images, num_patches = context.shape
    # The place itself in the lowest bits makes all words of a row different.
    index_bits = num_patches.bit_length()
    order = (words >> index_bits << index_bits) + np.arange(num_patches, dtype=np.uint64)
    order[~context] = np.iinfo(np.uint64).max
    last = np.partition(order, num_kept - 1, axis=1)[:, num_kept - 1 : num_kept]
    kept = np.flatnonzero(order <= last).reshape(num_images, num_kept)
    return kept - np.arange(num_images)[:, None] * num_patches
