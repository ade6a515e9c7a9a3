"""What aggregate_neighbors and pool_neighbors share: a softmax over a patch itself and its K neighbours.

Shapes are those of the two operators: U covered patches, R patches of the neighbourhood, K neighbours, H heads, D = H *
head size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import accumulation_dtype
from .launch import contiguous_rows, launch


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless `dim` divides into `num_heads` heads whose size is a multiple of 8."""
    if num_heads < 1 or dim % num_heads or dim // num_heads % 8:
        raise ValueError(f"a width of {dim} does not divide into {num_heads} heads of a size that is a multiple of 8")


def widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that sums are accumulated in."""
    return [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in tensors]


def softmax_weights(self_score: Tensor, scores: list[Tensor], neighbor_index: Tensor) -> Tensor:
    """Weights [K+1, U, H] from the patch's own score [U, H] and K scores [U, H]; missing neighbours have weight 0."""
    masked = [score.masked_fill(neighbor_index[:, j, None] < 0, -math.inf) for j, score in enumerate(scores)]
    return torch.softmax(torch.stack([self_score, *masked]), dim=0)


def weighted_sum(weight: Tensor, self_value: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Sum [U, D], in float32 or wider, of the values that the weights [K+1, U, H] belong to.

    Args:
        self_value: [U, D].
        value: [R, D].
        index: [U, K], which values of `value`; not negative.
    """
    heads = (weight.shape[2], -1)
    wide = accumulation_dtype(value.dtype)
    total = weight[0, :, :, None] * self_value.to(wide).unflatten(1, heads)
    for j in range(index.shape[1]):
        neighbor = value.index_select(0, index[:, j]).to(wide).unflatten(1, heads)
        total = total + weight[j + 1, :, :, None] * neighbor
    return total.flatten(1)


# A block of 16 patches and 256 columns gives each of 128 threads four independent 16-byte loads in 16-bit formats.
BLOCK_U = 16
BLOCK_COLUMNS = 256


def head_blocks(dim: int, num_heads: int) -> dict[str, int]:
    """The constants of a kernel that `locate_heads` takes.

    Head sizes are padded to a power of two. Masked lanes load nothing, so that padding costs no memory traffic.
    """
    block_head_dim = triton.next_power_of_2(dim // num_heads)
    block_heads = max(1, min(triton.next_power_of_2(num_heads), BLOCK_COLUMNS // block_head_dim))
    return {
        "H": num_heads,
        "HEAD_DIM": dim // num_heads,
        "BLOCK_U": BLOCK_U,
        "BLOCK_H": block_heads,
        "BLOCK_HEAD_DIM": block_head_dim,
    }


def launch_over_heads(
    kernel: triton.JITFunction,
    tensors: list[Tensor],
    indices: list[Tensor],
    output: Tensor,
    num_heads: int,
    *scalars: float,
) -> Tensor:
    """Runs a kernel that finds its patches and heads with `locate_heads`, and returns `output`.

    The kernel takes `tensors`, `indices`, `output`, U, the row strides of `tensors`, and `scalars`.

    Args:
        kernel: the Triton kernel.
        tensors: inputs whose rows may lie apart.
        indices: integer inputs, made contiguous; the first one is the neighbor index [U, K].
        output: [U, D], contiguous.
        num_heads: H.
        scalars: further arguments.
    """
    num_covered, dim = output.shape
    tensors = [contiguous_rows(tensor) for tensor in tensors]
    blocks = head_blocks(dim, num_heads)
    launch(
        kernel,
        triton.cdiv(num_covered, blocks["BLOCK_U"]) * triton.cdiv(num_heads, blocks["BLOCK_H"]),
        *tensors,
        *(index.contiguous() for index in indices),
        output,
        num_covered,
        *(tensor.stride(0) for tensor in tensors),
        *scalars,
        K=indices[0].shape[1],
        **blocks,
    )
    return output


@triton.jit
def locate_heads(
    num_covered,
    H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    """Offsets and masks of this program's patches and heads: o_u [U], o_h [H], o_head [1, H, d], m_u, m_h, m_head."""
    num_blocks_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    o_u = tl.program_id(0) // num_blocks_h * BLOCK_U + tl.arange(0, BLOCK_U)
    o_h = tl.program_id(0) % num_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_e = tl.arange(0, BLOCK_HEAD_DIM)
    m_h = o_h < H
    o_head = (o_h * HEAD_DIM)[None, :, None] + o_e[None, None, :]
    m_head = m_h[None, :, None] & (o_e < HEAD_DIM)[None, None, :]
    return o_u, o_h, o_head, o_u < num_covered, m_h, m_head


@triton.jit
def add_to_softmax(b_max, b_sum, b_total, b_score, b_value):
    """Adds one value to an online softmax: scores [U, H] in base 2, totals [U, H, d] relative to exp2(b_max)."""
    b_new_max = tl.maximum(b_max, b_score)
    b_old = tl.exp2(b_max - b_new_max)
    b_weight = tl.exp2(b_score - b_new_max)
    b_total = b_total * b_old[:, :, None] + b_value * b_weight[:, :, None]
    return b_new_max, b_sum * b_old + b_weight, b_total
