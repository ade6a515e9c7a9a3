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

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

from dmtjepa.config import MaskSettings
from dmtjepa.packing import PackedSequences, Packing, pack, pack_predictions

# After so many context blocks that leave too few patches the released sampler gives up one target block.
TRIES_PER_REGION = 20
# Placements that are tried for an image. The released sampler, which gives up all targets in the end, never needs more
# than 20 for each of them and one; the corrected one would need more only under settings that check_masks refuses.
MAX_ATTEMPTS = 1000

REMEDY = "lower mask.min_keep, mask.pred_mask_scale or mask.num_pred_masks, or raise mask.enc_mask_scale"

# Streams of random words within a step.
SIZES, CORNERS, CUT = range(3)


class MaskError(ValueError):
    """Settings for which no valid mask exists, or none was found; the message says why and what to change."""


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

    target_size, context_size = _draw_sizes(settings, grid_size, seed, step)
    sizes = [target_size] * num_targets + [context_size]
    top, left, overlay, context = _place_blocks(settings, grid_size, sizes, seed, step, first, count)
    top, left, overlay = top[:num_targets, mine], left[:num_targets, mine], overlay[mine]
    num_kept = int(np.count_nonzero(context, axis=1).min())
    context = context[mine]

    packings = ()
    if settings.pack:
        context_index = np.flatnonzero(context)[None]
        length = np.count_nonzero(context, axis=1)
        packings = pack(length), pack_predictions(length, num_targets, math.prod(target_size))
    elif settings.sampler == "released":
        context_index = _first_patches(context, num_kept)
    else:
        words = _random_words(seed, step, CUT, 0, rank * batch_size * num_patches, batch_size * num_patches)
        context_index = _random_patches(context, num_kept, words.reshape(batch_size, num_patches))

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
    enlarged = _overlay_blocks(top - margin, left - margin, [size] * num_targets, grid_size, wrap=border == "wrap")
    neighborhood = np.flatnonzero(enlarged != 0)

    arrays = (context_index, target_index, target_unique, target_slot, neighborhood)
    return MaskBatch(*map(torch.from_numpy, arrays), *packings)


def check_masks(settings: MaskSettings, grid_size: tuple[int, int]) -> None:
    """Refuse settings under which some step would have no valid mask.

    Every block size that can be drawn must have more than min_keep patches, and every pair of a target and a context
    block size must have a placement in which the context, without the targets, keeps more than min_keep patches. (The
    published code loops for ever without the first, and always lets targets into the context without the second.) For
    the corrected sampler such placements must not be too rare either.

    Raises:
        MaskError: with the block sizes at fault and what to change.
    """
    rows, cols = grid_size
    keep = settings.min_keep
    sizes = {
        "target": _reachable_sizes(settings.pred_mask_scale, settings.aspect_ratio, grid_size, settings.sampler),
        "context": _reachable_sizes(settings.enc_mask_scale, (1.0, 1.0), grid_size, settings.sampler),
    }
    for kind, key in (("target", "pred_mask_scale"), ("context", "enc_mask_scale")):
        height, width = min(sizes[kind], key=math.prod)
        area = height * width
        if area <= keep:
            lower = f"lower mask.min_keep below {area}, " if area else ""
            raise MaskError(
                f"mask: on a grid of {rows}x{cols} patches a {kind} block can be {height}x{width}, {area} patches, and "
                f"it must have more than min_keep {keep}; {lower}raise mask.{key} or take smaller patches"
            )
    if settings.allow_overlap:
        return

    def longest(target: tuple[int, int], context: tuple[int, int]) -> int:
        # Targets take least from the context when they coincide, as far from it as the grid allows.
        overlap = 1
        for side, a, b in zip(_usable(grid_size, settings.sampler), target, context, strict=True):
            overlap *= max(0, a + b - side)
        return math.prod(context) - overlap

    target, context = min(((t, c) for t in sizes["target"] for c in sizes["context"]), key=lambda pair: longest(*pair))
    if longest(target, context) <= keep:
        raise MaskError(
            f"mask: on a grid of {rows}x{cols} patches a context block of {context[0]}x{context[1]} never keeps more "
            f"than {longest(target, context)} patches beside target blocks of {target[0]}x{target[1]}, and must keep "
            f"more than min_keep {keep}; {REMEDY}"
        )
    if settings.sampler == "corrected":
        # Where valid placements exist but are rare, a run would stop at some step. If each of these images finds one in
        # a hundred attempts, at least one attempt in about 20 succeeds, and a thousand in a row will not fail.
        crowded = [max(sizes["target"], key=math.prod)] * settings.num_pred_masks
        smallest = min(sizes["context"], key=math.prod)
        _place_blocks(settings, grid_size, [*crowded, smallest], 0, 0, 0, 1024, MAX_ATTEMPTS // 10)


def _random_words(seed: int, step: int, stream: int, attempt: int, first: int, count: int) -> np.ndarray:
    """[count] uint64: words first to first + count of the random sequence of (seed, step, stream, attempt)."""
    # Philox makes four words of each counter, so any word can be had without those before it.
    counter = np.array([first // 4, attempt, stream, 0], np.uint64)
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=counter)
    return generator.random_raw(first % 4 + count)[first % 4 :]


def _usable(grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Rows and columns that blocks can cover: the released sampler never reaches the last ones."""
    rows, cols = grid_size
    return (rows - 1, cols - 1) if sampler == "released" else (rows, cols)


def _block_size(area: int, aspect: float, grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Height and width of a block of about `area` patches, `aspect` = height / width."""
    rows, cols = _usable(grid_size, sampler)
    return min(round(math.sqrt(area * aspect)), rows), min(round(math.sqrt(area / aspect)), cols)


def _at(u: float, bounds: tuple[float, float]) -> float:
    """The value at u, 0 to 1, of the way through a range."""
    return bounds[0] + u * (bounds[1] - bounds[0])


def _draw_sizes(
    settings: MaskSettings, grid_size: tuple[int, int], seed: int, step: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of this step's target blocks, and of its context blocks."""
    u, v, w = ((_random_words(seed, step, SIZES, 0, 0, 3) >> np.uint64(11)) * 2.0**-53).tolist()
    if settings.sampler == "released":
        v = u
    target_area, context_area = (
        int(math.prod(grid_size) * _at(x, scale))
        for x, scale in ((u, settings.pred_mask_scale), (w, settings.enc_mask_scale))
    )
    target = _block_size(target_area, _at(v, settings.aspect_ratio), grid_size, settings.sampler)
    context = _block_size(context_area, 1.0, grid_size, settings.sampler)
    for kind, size in (("target", target), ("context", context)):
        if math.prod(size) <= settings.min_keep:
            raise MaskError(
                f"mask: at step {step} the {kind} blocks are {size[0]}x{size[1]}, not more than min_keep "
                f"{settings.min_keep} patches; lower mask.min_keep or enlarge the blocks"
            )
    return target, context


def _reachable_sizes(
    scale: tuple[float, float], aspect: tuple[float, float], grid_size: tuple[int, int], sampler: str
) -> set[tuple[int, int]]:
    """Every block size that `_draw_sizes` can give from these ranges of area (of the grid's) and aspect.

    The size is a step function of the two random numbers; it is evaluated once between every two neighbouring places
    where it may step.
    """
    num_patches = math.prod(grid_size)

    def places(values: Iterable[float], bounds: tuple[float, float]) -> list[float]:
        span = bounds[1] - bounds[0]
        return [(value - bounds[0]) / span for value in values] if span else []

    def pieces(low: float, high: float, edges: list[float]) -> list[tuple[float, float]]:
        inside = sorted({low, high, *(edge for edge in edges if low < edge < high)})
        # A shorter piece is an edge that two ways of rounding have made two of.
        return [(a, b) for a, b in itertools.pairwise(inside) if b - a > 1e-12]

    sizes = set()
    areas = range(int(num_patches * scale[0]), int(num_patches * scale[1]) + 2)
    for low, high in pieces(0.0, 1.0, places((area / num_patches for area in areas), scale)):
        area = int(num_patches * _at((low + high) / 2, scale))
        if area == 0:
            sizes.add((0, 0))
            continue
        # The aspects at which height or width passes a half, and is rounded to another number.
        halves = [(side + 0.5) ** 2 for side in range(max(grid_size))]
        steps = places([half / area for half in halves] + [area / half for half in halves], aspect)
        bounds = (low, high) if sampler == "released" else (0.0, 1.0)
        for a, b in pieces(*bounds, steps):
            sizes.add(_block_size(area, _at((a + b) / 2, aspect), grid_size, sampler))
    return sizes


def _place_blocks(
    settings: MaskSettings,
    grid_size: tuple[int, int],
    sizes: list[tuple[int, int]],
    seed: int,
    step: int,
    first: int,
    count: int,
    max_attempts: int = MAX_ATTEMPTS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of the images first to first + count of the global batch.

    sizes: heights and widths of the M target blocks, then of the context block.
    Returns top and left [M + 1, count] of their blocks, the context block last; their overlay [count, N], whose bit m
    is set where block m is; and context [count, N], bool.
    """
    released = settings.sampler == "released"
    num_targets = settings.num_pred_masks
    num_blocks = num_targets + 1
    num_tops, num_lefts = (
        np.array([[side - size[axis] + 1] for size in sizes], np.uint64)
        for axis, side in enumerate(_usable(grid_size, settings.sampler))
    )
    num_excluded = 0 if settings.allow_overlap else num_targets

    top, left = np.empty((2, num_blocks, count), np.int32)
    pending = np.arange(count)
    for attempt in range(max_attempts):
        words = _random_words(seed, step, CORNERS, attempt, first * num_blocks, count * num_blocks)
        words = words.reshape(count, num_blocks)[pending].T
        redrawn = slice(num_targets if released and attempt else 0, None)
        # Half a word for each coordinate; the bias, the number of positions over 2**32, is beyond any measurement.
        top[redrawn, pending] = (((words >> 32) * num_tops) >> 32)[redrawn]
        left[redrawn, pending] = (((words & 0xFFFFFFFF) * num_lefts) >> 32)[redrawn]

        redone = _overlay_blocks(top[:, pending], left[:, pending], sizes, grid_size)
        excluded = num_excluded - attempt // TRIES_PER_REGION if released else num_excluded
        # In the context block, and in none of the targets that are kept out of it.
        free = (redone & ((1 << num_targets) + (1 << excluded) - 1)) == 1 << num_targets
        if attempt == 0:
            overlay, context = redone, free
        else:
            overlay[pending], context[pending] = redone, free
        pending = pending[np.count_nonzero(free, axis=1) <= settings.min_keep]
        if not len(pending):
            return top, left, overlay, context
    raise MaskError(
        f"mask: at step {step}, image {first + pending[0]}: no placement in {max_attempts} attempts leaves more than "
        f"min_keep {settings.min_keep} patches of a {sizes[-1][0]}x{sizes[-1][1]} context block beside {num_targets} "
        f"target blocks of {sizes[0][0]}x{sizes[0][1]}; {REMEDY}"
    )


def _overlay_blocks(
    top: np.ndarray, left: np.ndarray, sizes: list[tuple[int, int]], grid_size: tuple[int, int], wrap: bool = False
) -> np.ndarray:
    """[B, N] unsigned: bit m of a patch is set where block m of its image lies.

    Blocks may reach over the grid's edges; they are cut off there, or go on at the opposite side (wrap).

    top, left: [M, B] int32, the upper left patches of the blocks; sizes: M heights and widths.
    """
    word = np.min_scalar_type((1 << len(sizes)) - 1)
    bit = np.array([[[1 << m]] for m in range(len(sizes))], word)
    # A patch is in a block when its row and its column are: for all blocks, one AND of a row's and a column's bits.
    spans = []
    for axis, start in enumerate((top, left)):
        side = grid_size[axis]
        length = np.array([min(size[axis], side) if wrap else size[axis] for size in sizes], np.uint32)[:, None, None]
        start = start % side if wrap else start
        # Seen as unsigned, an offset before the block is a large number, so one comparison does for both ends.
        offset = np.arange(side, dtype=np.int32) - start[:, :, None]
        inside = offset.view(np.uint32) < length
        if wrap:
            inside |= (offset + np.int32(side)).view(np.uint32) < length
        spans.append(np.bitwise_or.reduce(inside * bit, axis=0))
    rows, cols = spans
    return (rows[:, :, None] & cols[:, None, :]).reshape(len(rows), -1)


def _first_patches(context: np.ndarray, num_kept: int) -> np.ndarray:
    """[B, num_kept] int64: the first True places of each row of context [B, N]."""
    num_images, num_patches = context.shape
    start = np.arange(num_images)[:, None] * num_patches
    flat = np.flatnonzero(context)
    return flat[np.searchsorted(flat, start) + np.arange(num_kept)] - start


def _random_patches(context: np.ndarray, num_kept: int, words: np.ndarray) -> np.ndarray:
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
