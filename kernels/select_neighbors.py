"""select_neighbors: for each covered patch, the most similar patches of the window around it.

The cosine is computed as the dot product divided by the candidate's norm alone: the norm of the patch itself does not
change the order of its candidates.
"""

import math

import torch
import triton
import triton.language as tl
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
from .launch import block_columns, contiguous_rows, cpu_blocks, launch
from .registration import define_operator

# Patches of zeros have cosine 0 with everything, as in torch.nn.functional.normalize.
EPS = 1e-12
# Sorts behind every patch number.
_MISSING = 2**62


def select_neighbors(
    h: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
) -> Tensor:
    """The `num_neighbors` patches most similar to each of `patches`, within the window around it.

    The candidates of a patch are the window*window - 1 patches around it. Similarity is the cosine (section 3.2 of the
    paper), accumulated in float32. Of equally similar candidates the lower patch number comes first; a NaN ranks last.

    Args:
        h: [B, N, D] patch features, bfloat16, float16 or float32 (float64 on the CPU); any strides.
        patches: [U], int32 or int64, flat patch numbers b*N + n in any order; ascending is fastest on a GPU.
        grid_size: (rows, columns) with rows * columns = N; patches are in raster order.
        num_neighbors: K, 1 to 8.
        window: 3, 5 or 7, at most the shorter side of the grid.
        border: what lies beyond the edge of the grid. "wrap" takes the window modulo the grid. "clip" leaves these
            candidates out, so that a patch at the edge may have fewer than K neighbours.

    Returns:
        [U, K] int64, flat patch numbers b*N + n of the same image, most similar first, then -1 for missing neighbours.
        Not differentiable, as the choice is discrete.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, window or number of neighbours.
        IndexError: in debug mode, a patch out of range.
    """
    check_tensor("h", h, 3, FLOAT_DTYPES)
    check_tensor("patches", patches, 1, INDEX_DTYPES)
    check_same_device("h", h, patches=patches)
    check_window(grid_size, num_neighbors, window, border)
    if grid_size[0] * grid_size[1] != h.shape[1]:
        raise ValueError(f"h has {h.shape[1]} patches per image but the grid is {grid_size[0]} x {grid_size[1]}")
    check_kernel_dtype("h", h)
    return select_neighbors_op(h.detach(), patches, *grid_size, num_neighbors, window, border)


def select_neighbors_reference(h, patches, grid_size, num_neighbors=4, window=3, border="wrap"):
    """The definition, one patch at a time."""
    rows, cols = grid_size
    radius = window // 2
    unit = torch.nn.functional.normalize(h.to(accumulation_dtype(h.dtype)), dim=-1, eps=EPS)
    neighbor_index = torch.full((len(patches), num_neighbors), -1, dtype=torch.int64)
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
        for slot, c in enumerate(ranked):
            neighbor_index[u, slot] = b * rows * cols + c
    return neighbor_index.to(h.device)


def select_neighbors_plain(
    h: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
) -> Tensor:
    """Vectorised PyTorch on any device; one candidate at a time, so that only [U, D] features are ever gathered."""
    wide = accumulation_dtype(h.dtype)
    features = h.detach().reshape(-1, h.shape[2])
    candidate = window_candidates(patches, grid_size, window, border)
    index = candidate.masked_fill(candidate == _MISSING, 0)
    own = features.index_select(0, patches).to(wide)
    # Not one batched matrix product: its blocking may round equal features differently, and ties must be exact.
    dots = [(own * features.index_select(0, index[:, c]).to(wide)).sum(1) for c in range(index.shape[1])]
    norm = torch.linalg.vector_norm(features, dim=1, dtype=wide)
    return rank_candidates(torch.stack(dots, 1), norm, candidate, num_neighbors)


def window_candidates(patches: Tensor, grid_size: tuple[int, int], window: int, border: str) -> Tensor:
    """Flat numbers of the candidates of each patch, [U, window*window - 1], ascending; _MISSING where off the grid."""
    rows, cols = grid_size
    place = torch.arange(window * window - 1, device=patches.device)
    place = place + (place >= window * window // 2)  # the patch itself is left out
    step_row, step_col = place // window - window // 2, place % window - window // 2
    patch = patches.long()[:, None]
    n = patch % (rows * cols)
    row, col = n // cols + step_row, n % cols + step_col
    candidate = patch - n + row % rows * cols + col % cols
    if border == "clip":
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        candidate = candidate.masked_fill(~inside, _MISSING)
    return candidate.sort(dim=1).values


def rank_candidates(dots: Tensor, norm: Tensor, candidate: Tensor, num_neighbors: int) -> Tensor:
    """The neighbours [U, K], from dot products [U, C] with the candidates [U, C] and the norms [B*N] of all patches."""
    missing = candidate == _MISSING
    similarity = dots / norm.clamp_min(EPS)[candidate.masked_fill(missing, 0)]
    similarity = torch.where(similarity.isnan(), torch.finfo(similarity.dtype).min, similarity)
    similarity = similarity.masked_fill(missing, -math.inf)
    # Candidates ascend and the sort is stable, so ties stay in ascending order.
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :num_neighbors]
    return candidate.masked_fill(missing, -1).gather(1, order)


@triton.jit
def _find_candidates(
    b_n,  # [BLOCK_U], patch numbers within their images
    m_u,  # [BLOCK_U]
    group,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW: tl.constexpr,
    WRAP: tl.constexpr,
):
    """Candidates group * 8 to group * 8 + 7 of each patch, [BLOCK_U, 8], as numbers n and as a mask."""
    radius: tl.constexpr = WINDOW // 2
    o_step = group * 8 + tl.arange(0, 8)
    o_step += (o_step >= WINDOW * WINDOW // 2).to(tl.int32)  # the patch in the middle is no candidate
    b_row = (b_n // COLS)[:, None] + (o_step // WINDOW - radius)[None, :]
    b_col = (b_n % COLS)[:, None] + (o_step % WINDOW - radius)[None, :]
    if WRAP:
        b_row = (b_row + ROWS) % ROWS
        b_col = (b_col + COLS) % COLS
    m_candidate = (b_row >= 0) & (b_row < ROWS) & (b_col >= 0) & (b_col < COLS) & m_u[:, None]
    return tl.where(m_candidate, b_row * COLS + b_col, ROWS * COLS), m_candidate


@triton.jit
def _compute_similarity(
    p_own,  # [BLOCK_U], pointers to the features [D] of the patches
    p_other,  # [BLOCK_U, 8], pointers to the features [D] of their candidates
    m_u,  # [BLOCK_U]
    m_candidate,  # [BLOCK_U, 8]
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Similarities [BLOCK_U, 8]: a NaN as the lowest number, a missing candidate as -inf.

    The columns are split in vectors of one 16-byte load, summed up within the thread that loaded them: two numbers are
    kept per vector, not per element. Blocks are [vectors, BLOCK_U, 8, VECTOR], because Triton spreads the threads of a
    warp over the first axis first: 8 of them read the 128 bytes of a row together. With 4 warps, a patch and its
    candidates then have one layout, and the loop exchanges nothing between threads.
    """
    vectors: tl.constexpr = BLOCK_D // VECTOR
    b_dot = tl.zeros([vectors, BLOCK_U, 8], dtype=tl.float32)
    b_square = tl.zeros([vectors, BLOCK_U, 8], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + (tl.arange(0, vectors) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        o_d = o_d[:, None, None, :]
        m_own = m_u[None, :, None, None] & (o_d < D)
        b_own = tl.load(p_own[None, :, None, None] + o_d, mask=m_own, other=0.0).to(tl.float32)
        m_other = m_candidate[None, :, :, None] & (o_d < D)
        b_other = tl.load(p_other[None, :, :, None] + o_d, mask=m_other, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_own * b_other, axis=3)
        b_square += tl.sum(b_other * b_other, axis=3)
    b_norm = tl.maximum(tl.sqrt(tl.sum(b_square, axis=0)), EPS)
    b_similarity = tl.sum(b_dot, axis=0) / b_norm
    b_similarity = tl.where(b_similarity == b_similarity, b_similarity, -3.0e38)
    return tl.where(m_candidate, b_similarity, float("-inf"))


@triton.jit
def _rank_candidates(
    b_similarity,  # [BLOCK_U, candidates]
    b_candidate,  # [BLOCK_U, candidates], patch numbers; NUM_PATCHES stands for none
    b_best,  # [BLOCK_U, 8], overwritten in the first K slots
    b_best_n,  # [BLOCK_U, 8], overwritten in the first K slots
    K: tl.constexpr,
    NUM_PATCHES: tl.constexpr,
):
    """The K most similar candidates and their patch numbers, in descending order."""
    o_slot = tl.arange(0, 8)
    for slot in tl.static_range(K):
        b_top = tl.max(b_similarity, axis=1)
        b_top_n = tl.min(tl.where(b_similarity == b_top[:, None], b_candidate, NUM_PATCHES), axis=1)
        b_best = tl.where(o_slot[None, :] == slot, b_top[:, None], b_best)
        b_best_n = tl.where(o_slot[None, :] == slot, b_top_n[:, None], b_best_n)
        m_taken = b_candidate == b_top_n[:, None]
        b_similarity = tl.where(m_taken, float("-inf"), b_similarity)
        b_candidate = tl.where(m_taken, NUM_PATCHES, b_candidate)
    return b_best, b_best_n


@triton.jit(do_not_specialize=["num_covered"])
def _select_neighbors_kernel(
    p_h,  # [B, N, D], strides (s_image, s_patch, 1)
    p_patches,  # [U], contiguous
    p_neighbor_index,  # int64 [U, K], contiguous
    num_covered,  # U
    s_image,
    s_patch,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    WRAP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program ranks the candidates of BLOCK_U patches.

    window*window - 1 is a multiple of 8 for every odd window. Candidates are taken 8 at a time, as one [BLOCK_U, 8,
    BLOCK_D] block per step, so that 8 candidates share one load of the patch's own features. Adjacent patches have most
    candidates in common and find each other's features in the L1 cache.
    """
    num_patches: tl.constexpr = ROWS * COLS
    num_groups: tl.constexpr = (WINDOW * WINDOW - 1) // 8
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    o_slot = tl.arange(0, 8)
    m_u = o_u < num_covered
    b_patch = tl.load(p_patches + o_u, mask=m_u, other=0).to(tl.int64)
    b_n = (b_patch % num_patches).to(tl.int32)
    p_image = p_h + b_patch // num_patches * s_image
    p_own = p_image + b_n.to(tl.int64) * s_patch

    b_best = tl.full([BLOCK_U, 8], float("-inf"), dtype=tl.float32)
    b_best_n = tl.full([BLOCK_U, 8], num_patches, dtype=tl.int32)
    for group in range(num_groups):
        b_candidate, m_candidate = _find_candidates(b_n, m_u, group, ROWS, COLS, WINDOW, WRAP)
        p_other = p_image[:, None] + b_candidate.to(tl.int64) * s_patch
        b_similarity = _compute_similarity(p_own, p_other, m_u, m_candidate, D, EPS, BLOCK_U, BLOCK_D, VECTOR)
        if num_groups > 1:  # rank these 8 among the best so far
            b_similarity = tl.reshape(tl.join(b_similarity, b_best), [BLOCK_U, 16])
            b_candidate = tl.reshape(tl.join(b_candidate, b_best_n), [BLOCK_U, 16])
        b_best, b_best_n = _rank_candidates(b_similarity, b_candidate, b_best, b_best_n, K, num_patches)

    b_neighbor = tl.where(b_best_n < num_patches, (b_patch - b_n)[:, None] + b_best_n, -1)
    p_neighbor = p_neighbor_index + o_u.to(tl.int64)[:, None] * K + o_slot[None, :]
    tl.store(p_neighbor, b_neighbor, mask=m_u[:, None] & (o_slot < K)[None, :])


# Features are read a cache line at a time. With 128 threads a step is eight 16-byte loads of candidates per thread, and
# one of their patch.
_BLOCK_U = 16
_BLOCK_BYTES = 128
_VECTOR_BYTES = 16


def launch_select_neighbors(h, patches, rows, cols, num_neighbors, window, border):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    debug_check_index("patches", patches, h.shape[0] * h.shape[1])
    h, patches = contiguous_rows(h), patches.contiguous()
    num_covered, dim = patches.shape[0], h.shape[2]
    vector = _VECTOR_BYTES // h.itemsize
    neighbor_index = torch.empty((num_covered, num_neighbors), dtype=torch.int64, device=h.device)
    launch(
        _select_neighbors_kernel,
        triton.cdiv(num_covered, _BLOCK_U),
        h,
        patches,
        neighbor_index,
        num_covered,
        h.stride(0),
        h.stride(1),
        ROWS=rows,
        COLS=cols,
        D=dim,
        K=num_neighbors,
        WINDOW=window,
        WRAP=border == "wrap",
        EPS=EPS,
        BLOCK_U=_BLOCK_U,
        BLOCK_D=max(vector, block_columns(dim, h.itemsize, _BLOCK_BYTES)),
        VECTOR=vector,
        num_warps=4,
    )
    return neighbor_index


def select_neighbors_cpu(h, patches, rows, cols, num_neighbors, window, border):
    """The implementation for CPU tensors: a block of patches and one candidate of each at a time."""
    debug_check_index("patches", patches, h.shape[0] * h.shape[1])
    wide = accumulation_dtype(h.dtype)
    features = h.reshape(-1, h.shape[2])
    candidate = window_candidates(patches, (rows, cols), window, border)
    index = candidate.masked_fill(candidate == _MISSING, 0)
    dots = torch.empty(candidate.shape, dtype=wide)
    for block in cpu_blocks(len(patches), h.shape[2]):
        own = features.index_select(0, patches[block]).to(wide)
        for c in range(candidate.shape[1]):
            other = features.index_select(0, index[block, c]).to(wide)
            dots[block, c] = other.mul_(own).sum(1)
    norm = torch.linalg.vector_norm(features, dim=1, dtype=wide)
    return rank_candidates(dots, norm, candidate, num_neighbors)


def _empty_output(h, patches, rows, cols, num_neighbors, window, border):
    return patches.new_empty(patches.shape[0], num_neighbors, dtype=torch.int64)


select_neighbors_op = define_operator(
    "select_neighbors(Tensor h, Tensor patches, SymInt rows, SymInt cols, SymInt num_neighbors, SymInt window, "
    "str border) -> Tensor",
    cuda=launch_select_neighbors,
    cpu=select_neighbors_cpu,
    fake=_empty_output,
)
