"""Random block sizes and positions, addressed by (seed, step, attempt, image)."""

from __future__ import annotations

import math

import numpy as np

from dmtjepa.config import MaskSettings
from dmtjepa.errors import UserError
from dmtjepa.masks.geometry import block_size, interpolate, overlay_blocks, usable_grid

# After this many context blocks that leave too few patches, the context may overlap one more target block (official).
TRIES_PER_REGION = 20
# Maximum number of placements that are tried for an image. The official sampler never needs more than 20 per target
# block and one, since the context may then overlap all targets. The corrected sampler needs more only with settings
# that check_masks rejects.
MAX_ATTEMPTS = 1000

REMEDY = "lower mask.min_keep, mask.pred_mask_scale or mask.num_pred_masks, or raise mask.enc_mask_scale"

# Streams of random words within a step.
SIZES, CORNERS, CUT = range(3)


class MaskError(UserError, ValueError):
    """No valid mask exists, or none was found. The message says why and what to change."""


def random_words(seed: int, step: int, stream: int, attempt: int, first: int, count: int) -> np.ndarray:
    """Return words first to first + count of the random sequence (seed, step, stream, attempt): [count] uint64."""
    # Philox computes four words from each counter value, so that the sequence can start anywhere.
    counter = np.array([first // 4, attempt, stream, 0], np.uint64)
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=counter)
    return generator.random_raw(first % 4 + count)[first % 4 :]


def draw_sizes(
    settings: MaskSettings, grid_size: tuple[int, int], seed: int, step: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw height and width of the target blocks and of the context blocks of a step.

    Raises:
        MaskError: a size has not more than min_keep patches.
    """
    u, v, w = ((random_words(seed, step, SIZES, 0, 0, 3) >> np.uint64(11)) * 2.0**-53).tolist()
    if settings.sampler == "released":
        v = u
    target_area, context_area = (
        int(math.prod(grid_size) * interpolate(x, scale))
        for x, scale in ((u, settings.pred_mask_scale), (w, settings.enc_mask_scale))
    )
    target = block_size(target_area, interpolate(v, settings.aspect_ratio), grid_size, settings.sampler)
    context = block_size(context_area, 1.0, grid_size, settings.sampler)
    for kind, size in (("target", target), ("context", context)):
        if math.prod(size) <= settings.min_keep:
            raise MaskError(
                f"mask: at step {step} the {kind} blocks are {size[0]}x{size[1]}, not more than min_keep "
                f"{settings.min_keep} patches; lower mask.min_keep or enlarge the blocks"
            )
    return target, context


def _count_positions(sizes: list[tuple[int, int]], grid_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many rows and how many columns the upper left patch of each block can have: two [M, 1] uint64."""
    num_tops, num_lefts = (
        np.array([[side - size[axis] + 1] for size in sizes], np.uint64) for axis, side in enumerate(grid_size)
    )
    return num_tops, num_lefts


def place_blocks(
    settings: MaskSettings,
    grid_size: tuple[int, int],
    sizes: list[tuple[int, int]],
    seed: int,
    step: int,
    first: int,
    count: int,
    max_attempts: int = MAX_ATTEMPTS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw the positions of all blocks of some images of the global batch.

    Args:
        settings: the `mask` section.
        grid_size: rows and columns of the patch grid.
        sizes: heights and widths of the M target blocks, then of the context block.
        seed, step: address of the random numbers.
        first, count: the images first to first + count of the global batch.
        max_attempts: number of placements that are tried for an image.

    Returns:
        top, left: [M + 1, count] int32 rows and columns of the upper left patches; the context block is last.
        overlay: [count, N] unsigned integers. Bit m is set if block m covers the patch.
        context: [count, N] bool, the patches of the context before it is cut.

    Raises:
        MaskError: an image has no valid placement in `max_attempts` attempts.
    """
    released = settings.sampler == "released"
    num_targets = settings.num_pred_masks
    num_blocks = num_targets + 1
    num_tops, num_lefts = _count_positions(sizes, usable_grid(grid_size, settings.sampler))
    num_excluded = 0 if settings.allow_overlap else num_targets

    top, left = np.empty((2, num_blocks, count), np.int32)
    pending = np.arange(count)
    for attempt in range(max_attempts):
        words = random_words(seed, step, CORNERS, attempt, first * num_blocks, count * num_blocks)
        words = words.reshape(count, num_blocks)[pending].T
        redrawn = slice(num_targets if released and attempt else 0, None)
        # Half a word for each coordinate. The bias, number of positions / 2**32, is negligible.
        top[redrawn, pending] = (((words >> 32) * num_tops) >> 32)[redrawn]
        left[redrawn, pending] = (((words & 0xFFFFFFFF) * num_lefts) >> 32)[redrawn]

        redone = overlay_blocks(top[:, pending], left[:, pending], sizes, grid_size)
        excluded = num_excluded - attempt // TRIES_PER_REGION if released else num_excluded
        # Patches in the context block and in none of the excluded target blocks.
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
