"""select_neighbors: for each covered patch, the most similar patches of the window around it.

    h               [B, N, D]   bf16, fp16, fp32; N = rows * cols of the grid, in raster order
    patches         [U]         int32 or int64, flat patch numbers b*N + n
    neighbor_index  [U, K]      int64, flat b*N + n of the same image, most similar first, -1 in missing slots
    count           [U]         int32, how many of the K slots are filled

The candidates of patch n are the window*window - 1 patches around it. Beyond the edge, `border="wrap"` takes the window
modulo the grid, and `border="clip"` leaves candidates out, so that a corner may fill fewer than K slots. Similarity is
the cosine, accumulated in float32; of equally similar candidates the lower patch number comes first (a NaN ranks last).

The cosine is the dot product divided by the candidate's norm alone: the norm of the patch itself does not change the
order of its candidates.
"""

import math

import torch
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    accumulation_dtype,
    check_kernel_dtype,
    check_same_device,
    check_tensor,
    check_window,
    debug_check_index,
)

# A row of zeros has cosine 0 with everything, as in torch.nn.functional.normalize.
EPS = 1e-12
# Sorts behind every patch number.
_MISSING = 2**62


def select_neighbors_reference(
    h: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
) -> tuple[Tensor, Tensor]:
    """The definition, one patch at a time."""
    rows, cols = grid_size
    radius = window // 2
    unit = torch.nn.functional.normalize(h.to(accumulation_dtype(h.dtype)), dim=-1, eps=EPS)
    neighbor_index = torch.full((len(patches), num_neighbors), -1, dtype=torch.int64)
    count = torch.zeros(len(patches), dtype=torch.int32)
    for u, patch in enumerate(patches.tolist()):
        b, n = divmod(patch, rows * cols)
        row, col = divmod(n, cols)
        candidates = []
        for i in range(row - radius, row + radius + 1):
            for j in range(col - radius, col + radius + 1):
                if border == "wrap" or (0 <= i < rows and 0 <= j < cols):
                    candidates.append(i % rows * cols + j % cols)
        candidates.remove(n)
        ranked = sorted(candidates, key=lambda c: (-float((unit[b, n] * unit[b, c]).sum()), c))[:num_neighbors]
        count[u] = len(ranked)
        for slot, c in enumerate(ranked):
            neighbor_index[u, slot] = b * rows * cols + c
    return neighbor_index.to(h.device), count.to(h.device)


def window_candidates(patches: Tensor, grid_size: tuple[int, int], window: int, border: str) -> Tensor:
    """Flat numbers of the candidates of each patch, [U, window*window - 1], ascending; _MISSING where off the grid."""
    rows, cols = grid_size
    radius = window // 2
    side = torch.arange(-radius, radius + 1, device=patches.device)
    step_row = side.repeat_interleave(window)
    step_col = side.repeat(window)
    others = [o for o in range(window * window) if o != window * window // 2]
    step_row, step_col = step_row[others], step_col[others]
    patch = patches.long()[:, None]
    n = patch % (rows * cols)
    row, col = n // cols + step_row, n % cols + step_col
    candidate = patch - n + row % rows * cols + col % cols
    if border == "clip":
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        candidate = candidate.masked_fill(~inside, _MISSING)
    return candidate.sort(dim=1).values


def rank_candidates(dots: Tensor, norm: Tensor, candidate: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Neighbours and count, from the dot products [U, C] with `candidate` [U, C] and the norms [B*N] of all rows."""
    missing = candidate == _MISSING
    similarity = dots / norm.clamp_min(EPS)[candidate.masked_fill(missing, 0)]
    similarity = torch.where(similarity.isnan(), torch.finfo(similarity.dtype).min, similarity)
    similarity = similarity.masked_fill(missing, -math.inf)
    # Candidates ascend and the sort is stable, so ties stay in ascending order.
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :num_neighbors]
    neighbor_index = candidate.masked_fill(missing, -1).gather(1, order)
    return neighbor_index, (neighbor_index >= 0).sum(1, dtype=torch.int32)


def select_neighbors_plain(
    h: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
) -> tuple[Tensor, Tensor]:
    """Vectorised PyTorch on any device; one candidate at a time, so that only [U, D] rows are ever gathered."""
    wide = accumulation_dtype(h.dtype)
    flat = h.detach().reshape(-1, h.shape[2])
    candidate = window_candidates(patches, grid_size, window, border)
    rows = candidate.masked_fill(candidate == _MISSING, 0)
    own = flat.index_select(0, patches).to(wide)
    # Not one batched matrix product: its blocking may round equal rows differently, and ties must be exact.
    dots = [(own * flat.index_select(0, rows[:, c]).to(wide)).sum(1) for c in range(rows.shape[1])]
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=wide)
    return rank_candidates(torch.stack(dots, 1), norm, candidate, num_neighbors)


# CPU: a block of patches and of one candidate each stay within a core's L2 cache.
_BLOCK_ELEMENTS = 2**16


@torch.library.custom_op("dmtjepa::select_neighbors", mutates_args=(), device_types="cpu")
def _select_neighbors(
    h: Tensor, patches: Tensor, rows: int, cols: int, num_neighbors: int, window: int, border: str
) -> tuple[Tensor, Tensor]:
    debug_check_index("patches", patches, h.shape[0] * h.shape[1])
    wide = accumulation_dtype(h.dtype)
    flat = h.reshape(-1, h.shape[2])
    candidate = window_candidates(patches, (rows, cols), window, border)
    flat_rows = candidate.masked_fill(candidate == _MISSING, 0)
    dots = torch.empty(candidate.shape, dtype=wide)
    block = max(1, _BLOCK_ELEMENTS // h.shape[2])
    for start in range(0, len(patches), block):
        at = slice(start, start + block)
        own = flat.index_select(0, patches[at]).to(wide)
        for c in range(candidate.shape[1]):
            other = flat.index_select(0, flat_rows[at, c]).to(wide)
            dots[at, c] = other.mul_(own).sum(1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=wide)
    return rank_candidates(dots, norm, candidate, num_neighbors)


@_select_neighbors.register_fake
def _(
    h: Tensor, patches: Tensor, rows: int, cols: int, num_neighbors: int, window: int, border: str
) -> tuple[Tensor, Tensor]:
    neighbor_index = patches.new_empty(patches.shape[0], num_neighbors, dtype=torch.int64)
    return neighbor_index, patches.new_empty(patches.shape[0], dtype=torch.int32)


def check_arguments(
    h: Tensor, patches: Tensor, grid_size: tuple[int, int], num_neighbors: int, window: int, border: str
) -> None:
    check_tensor("h", h, 3, FLOAT_DTYPES)
    check_tensor("patches", patches, 1, INDEX_DTYPES)
    check_same_device("h", h, patches=patches)
    check_window(grid_size, num_neighbors, window, border)
    if grid_size[0] * grid_size[1] != h.shape[1]:
        raise ValueError(f"h has {h.shape[1]} patches per image but the grid is {grid_size[0]} x {grid_size[1]}")


def select_neighbors(
    h: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
) -> tuple[Tensor, Tensor]:
    """The `num_neighbors` patches most similar to each of `patches`, within the window around it.

    Args:
        h: [B, N, D] patch features, bf16, fp16 or fp32 (and float64 on the CPU); any strides.
        patches: [U] flat patch numbers b*N + n, int32 or int64, in any order; ascending is fastest on a GPU.
        grid_size: (rows, cols), rows * cols = N.
        num_neighbors: K, 1 to 8 and at most window*window - 1.
        window: 3, 5 or 7, at most the shorter side of the grid.
        border: "wrap" or "clip".

    Returns:
        neighbor_index [U, K] int64, flat b*N + n, most similar first, -1 in missing slots; count [U] int32.
        No gradient: the choice is discrete.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, window or count. IndexError: in debug mode, a patch out of
        range.
    """
    check_arguments(h, patches, grid_size, num_neighbors, window, border)
    check_kernel_dtype("h", h)
    return _select_neighbors(h.detach(), patches, grid_size[0], grid_size[1], num_neighbors, window, border)
