"""A slow and simple mask sampler that `dmtjepa.masks` is tested against.

It has the same distributions, but other random numbers.
"""

from __future__ import annotations

import math
import random

from dmtjepa.config import MaskSettings

Patch = tuple[int, int]  # row and column
Size = tuple[int, int]  # height and width


def sample_masks_reference(
    settings: MaskSettings, grid_size: tuple[int, int], batch_size: int, rng: random.Random
) -> tuple[list[list[int]], list[list[list[int]]], Size, Size]:
    """Sample the masks of a batch of B images with M target blocks each.

    Settings must be valid (`check_masks`).

    Returns:
        The context of each image, B lists; the target blocks of each image, B lists of M lists; the size of the target
        blocks; the size of the context blocks. Patches are numbers row * cols + col, in raster order.
    """
    cols = grid_size[1]
    target_size = draw_size(settings.pred_mask_scale, settings.aspect_ratio, grid_size, settings.sampler, rng)
    context_size = draw_size(settings.enc_mask_scale, (1.0, 1.0), grid_size, settings.sampler, rng)

    all_targets: list[list[list[int]]] = []
    all_contexts: list[list[int]] = []
    for _ in range(batch_size):
        num_failures = 0
        while True:
            if num_failures == 0 or settings.sampler == "corrected":
                targets = [
                    draw_block(target_size, grid_size, settings.sampler, rng) for _ in range(settings.num_pred_masks)
                ]
            avoided = list(targets)
            if settings.allow_overlap:
                avoided = []
            elif settings.sampler == "released":
                for _ in range(num_failures // 20):
                    avoided.pop()
            block = draw_block(context_size, grid_size, settings.sampler, rng)
            covered = {patch for target in avoided for patch in target}
            context = [patch for patch in block if patch not in covered]
            if len(context) > settings.min_keep:
                break
            num_failures += 1
        all_targets.append([[row * cols + col for row, col in target] for target in targets])
        all_contexts.append([row * cols + col for row, col in context])

    shortest = min(len(context) for context in all_contexts)
    if settings.sampler == "released":
        cut_contexts = [patches[:shortest] for patches in all_contexts]
    else:
        cut_contexts = [sorted(rng.sample(patches, shortest)) for patches in all_contexts]
    return cut_contexts, all_targets, target_size, context_size


def draw_size(
    scale: tuple[float, float],
    aspect: tuple[float, float],
    grid_size: tuple[int, int],
    sampler: str,
    rng: random.Random,
) -> Size:
    """Draw a block size. `scale` is the range of area / area of the grid, `aspect` the range of height / width."""
    rows, cols = grid_size
    u = rng.random()
    v = u if sampler == "released" else rng.random()
    area = math.floor(rows * cols * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + v * (aspect[1] - aspect[0])
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    if sampler == "released":
        return min(height, rows - 1), min(width, cols - 1)
    return min(height, rows), min(width, cols)


def draw_block(size: Size, grid_size: tuple[int, int], sampler: str, rng: random.Random) -> list[Patch]:
    """Draw a block and return its patches. The official sampler never covers the last row and column of the grid."""
    rows, cols = grid_size if sampler == "corrected" else (grid_size[0] - 1, grid_size[1] - 1)
    top = rng.randint(0, rows - size[0])
    left = rng.randint(0, cols - size[1])
    return [(top + i, left + j) for i in range(size[0]) for j in range(size[1])]


def index_targets_reference(
    targets: list[list[list[int]]], grid_size: tuple[int, int], window: int, border: str
) -> tuple[list[int], list[list[list[int]]], list[int]]:
    """Return target_unique, target_slot and neighborhood (see `MaskBatch`) for the target blocks of each image."""
    rows, cols = grid_size
    num_patches = rows * cols
    unique = sorted({b * num_patches + n for b, blocks in enumerate(targets) for block in blocks for n in block})
    place = {flat: slot for slot, flat in enumerate(unique)}
    slots = [[[place[b * num_patches + n] for n in block] for block in blocks] for b, blocks in enumerate(targets)]

    neighborhood = set()
    for flat in unique:
        b, n = divmod(flat, num_patches)
        for i in range(-(window // 2), window // 2 + 1):
            for j in range(-(window // 2), window // 2 + 1):
                row, col = n // cols + i, n % cols + j
                if border == "wrap":
                    row, col = row % rows, col % cols
                if 0 <= row < rows and 0 <= col < cols:
                    neighborhood.add(b * num_patches + row * cols + col)
    return unique, slots, sorted(neighborhood)
