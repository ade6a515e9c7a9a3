"""Sizes of blocks on a grid of patches, and which patches blocks cover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np


def usable_grid(grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Rows and columns that blocks can cover: the released sampler never reaches the last ones."""
    rows, cols = grid_size
    return (rows - 1, cols - 1) if sampler == "released" else (rows, cols)


def block_size(area: int, aspect: float, grid_size: tuple[int, int], sampler: str) -> tuple[int, int]:
    """Height and width of a block of about `area` patches, `aspect` = height / width."""
    rows, cols = usable_grid(grid_size, sampler)
    return min(round(math.sqrt(area * aspect)), rows), min(round(math.sqrt(area / aspect)), cols)


def interpolate(u: float, bounds: tuple[float, float]) -> float:
    """The value at u, 0 to 1, of the way through a range."""
    return bounds[0] + u * (bounds[1] - bounds[0])


def reachable_sizes(
    scale: tuple[float, float], aspect: tuple[float, float], grid_size: tuple[int, int], sampler: str
) -> set[tuple[int, int]]:
    """Every block size that `draw_sizes` can give from these ranges of area (of the grid's) and aspect.

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
        area = int(num_patches * interpolate((low + high) / 2, scale))
        if area == 0:
            sizes.add((0, 0))
            continue
        # The aspects at which height or width passes a half, and is rounded to another number.
        halves = [(side + 0.5) ** 2 for side in range(max(grid_size))]
        steps = places([half / area for half in halves] + [area / half for half in halves], aspect)
        bounds = (low, high) if sampler == "released" else (0.0, 1.0)
        for a, b in pieces(*bounds, steps):
            sizes.add(block_size(area, interpolate((a + b) / 2, aspect), grid_size, sampler))
    return sizes


def overlay_blocks(
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
