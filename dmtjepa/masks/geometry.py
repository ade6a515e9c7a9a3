"""Sizes of blocks on a grid of patches, and which patches blocks cover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np


def usable_grid(grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Return the rows and columns that blocks can cover. The official sampler never covers the last ones."""
    rows, cols = grid_size
    return (rows - 1, cols - 1) if sampler == "released" else (rows, cols)


def block_size(area: int, aspect: float, grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Return height and width of a block of about `area` patches with `aspect` = height / width."""
    rows, cols = usable_grid(grid_size, sampler)
    return min(round(math.sqrt(area * aspect)), rows), min(round(math.sqrt(area / aspect)), cols)


def interpolate(u: float, bounds: tuple[float, float]) -> float:
    """Interpolate linearly: the lower bound at u = 0, the upper bound at u = 1."""
    return bounds[0] + u * (bounds[1] - bounds[0])


def reachable_sizes(
    scale: tuple[float, float], aspect: tuple[float, float], grid_size: tuple[int, int], sampler: str
) -> set[tuple[int, int]]:
    """Return all block sizes that `draw_sizes` can draw.

    The size is a step function of two random numbers. It is evaluated once between each pair of neighbouring positions
    at which it can step.

    Args:
        scale: range of the area, as a fraction of the grid's.
        aspect: range of height / width.
        grid_size: rows and columns of the grid.
        sampler: `released` or `corrected`.
    """
    num_patches = math.prod(grid_size)

    def places(values: Iterable[float], bounds: tuple[float, float]) -> list[float]:
        span = bounds[1] - bounds[0]
        return [(value - bounds[0]) / span for value in values] if span else []

    def pieces(low: float, high: float, edges: list[float]) -> list[tuple[float, float]]:
        inside = sorted({low, high, *(edge for edge in edges if low < edge < high)})
        # A shorter piece is one edge that was computed twice with different rounding.
        return [(a, b) for a, b in itertools.pairwise(inside) if b - a > 1e-12]

    sizes = set()
    areas = range(int(num_patches * scale[0]), int(num_patches * scale[1]) + 2)
    for low, high in pieces(0.0, 1.0, places((area / num_patches for area in areas), scale)):
        area = int(num_patches * interpolate((low + high) / 2, scale))
        if area == 0:
            sizes.add((0, 0))
            continue
        # The aspects at which height or width passes a half, where it is rounded differently.
        halves = [(side + 0.5) ** 2 for side in range(max(grid_size))]
        steps = places([half / area for half in halves] + [area / half for half in halves], aspect)
        bounds = (low, high) if sampler == "released" else (0.0, 1.0)
        for a, b in pieces(*bounds, steps):
            sizes.add(block_size(area, interpolate((a + b) / 2, aspect), grid_size, sampler))
    return sizes


def overlay_blocks(
    top: np.ndarray, left: np.ndarray, sizes: list[tuple[int, int]], grid_size: tuple[int, int], wrap: bool = False
) -> np.ndarray:
    """Mark the patches that each block covers.

    Blocks may extend beyond the edges of the grid. They end at the edge, or with `wrap` continue at the opposite edge.

    Args:
        top, left: [M, B] int32 rows and columns of the upper left patch of each block.
        sizes: heights and widths of the M blocks.
        grid_size: rows and columns of the grid.

    Returns:
        [B, N] unsigned integers. Bit m of a patch is set if block m of its image covers the patch.
    """
    word = np.min_scalar_type((1 << len(sizes)) - 1)
    bit = np.array([[[1 << m]] for m in range(len(sizes))], word)
    # A block covers a patch if it covers its row and its column. For all blocks, this is one AND of two bit sets.
    spans = []
    for axis, start in enumerate((top, left)):
        side = grid_size[axis]
        length = np.array([min(size[axis], side) if wrap else size[axis] for size in sizes], np.uint32)[:, None, None]
        start = start % side if wrap else start
        # As unsigned numbers, offsets before the block are large, so that one comparison checks both ends.
        offset = np.arange(side, dtype=np.int32) - start[:, :, None]
        inside = offset.view(np.uint32) < length
        if wrap:
            inside |= (offset + np.int32(side)).view(np.uint32) < length
        spans.append(np.bitwise_or.reduce(inside * bit, axis=0))
    rows, cols = spans
    return (rows[:, :, None] & cols[:, None, :]).reshape(len(rows), -1)
