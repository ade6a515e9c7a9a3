"""pool_neighbors: softmax pooling of an image's token and K neighbours of a patch, by given scores.

It is aggregate_neighbors for a query that all patches of an image share: then one score per patch and head, computed
beforehand, takes the place of queries and keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_kernel_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    debug_check_index,
)
from .launch import cpu_blocks
from .neighbor_softmax import (
    add_to_softmax,
    check_heads,
    launch_over_heads,
    locate_heads,
    softmax_weights,
    weighted_sum,
    widen,
)
from .registration import define_operator, differentiate_through


def pool_neighbors(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    """Multi-head attention with given scores over the image's own value and the neighbours' values.

    For each covered patch u, its image b = image_index[u] and each head, with j over the neighbours neighbor_index[u]
    that are not -1:

        output[u] = softmax([self_score[b], score[j], ...]) . [self_value[b], value[j], ...]

    It is the first block of DMT-JEPA's aggregation head (section 3.2 of the paper), where the query is an image's mean.

    Args:
        self_score: [B, H], already scaled; bfloat16, float16 or float32 (float64 on the CPU).
        self_value: [B, D], any of these dtypes; the head size D / H is a multiple of 8.
        score: [R, H], already scaled, in the dtype of `self_score`, one per patch of the neighbourhood.
        value: [R, D] in the dtype of `self_value`.
        neighbor_index: [U, K], int32 or int64 in [0, R), indices into `score` and `value`; -1 marks a missing
            neighbour.
        image_index: [U], int32 or int64 in [0, B), the image of each covered patch.

    Returns:
        [U, D] in the dtype of `value`. Weights and sums are float32. Differentiable in the four float tensors.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        IndexError: in debug mode, an index out of range.
    """
    check_tensor("score", score, 2, FLOAT_DTYPES)
    check_tensor("value", value, 2, FLOAT_DTYPES)
    check_tensor("neighbor_index", neighbor_index, 2, INDEX_DTYPES)
    check_tensor("image_index", image_index, 1, INDEX_DTYPES)
    check_shape("self_score", self_score, (self_score.shape[0], score.shape[1]), "[B, H]")
    check_shape("self_value", self_value, (self_score.shape[0], value.shape[1]), "[B, D]")
    check_shape("score", score, (value.shape[0], score.shape[1]), "[R, H]")
    check_shape("neighbor_index", neighbor_index, (image_index.shape[0], neighbor_index.shape[1]), "[U, K]")
    others = {"self_score": self_score, "self_value": self_value, "score": score}
    check_same_device("value", value, **others, neighbor_index=neighbor_index, image_index=image_index)
    check_same_dtype("self_value", self_value, "value", value)
    check_same_dtype("self_score", self_score, "score", score)
    check_heads(value.shape[1], score.shape[1])
    check_kernel_dtype("value", value)
    return pool_neighbors_op(self_score, self_value, score, value, neighbor_index, image_index)


def pool_neighbors_reference(self_score, self_value, score, value, neighbor_index, image_index):
    """The definition, one patch and one head at a time."""
    num_heads = score.shape[1]
    head_dim = value.shape[1] // num_heads
    self_score, self_value, score, value = widen(self_score, self_value, score, value)
    output = value.new_empty(len(image_index), value.shape[1])
    for u, (neighbors, b) in enumerate(zip(neighbor_index.tolist(), image_index.tolist(), strict=True)):
        present = [j for j in neighbors if j >= 0]
        for h in range(num_heads):
            head = slice(h * head_dim, (h + 1) * head_dim)
            scores = torch.stack([self_score[b, h], *(score[j, h] for j in present)])
            values = torch.stack([self_value[b, head], *(value[j, head] for j in present)])
            output[u, head] = torch.softmax(scores, dim=0) @ values
    return output


def pool_neighbors_plain(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    """Vectorised PyTorch on any device; one neighbour at a time, so that only [U, D] tokens are ever gathered."""
    self_score, score = widen(self_score, score)
    index = neighbor_index.clamp_min(0)
    scores = [score.index_select(0, index[:, j]) for j in range(index.shape[1])]
    weight = softmax_weights(self_score.index_select(0, image_index), scores, neighbor_index)
    return weighted_sum(weight, self_value.index_select(0, image_index), value, index).to(value.dtype)


@triton.jit(do_not_specialize=["num_covered"])
def _pool_neighbors_kernel(
    p_self_score,  # [B, H], strides (s_self_score, 1)
    p_self_value,  # [B, D], strides (s_self_value, 1)
    p_score,  # [R, H], strides (s_score, 1)
    p_value,  # [R, D], strides (s_value, 1)
    p_neighbor_index,  # [U, K], contiguous
    p_image_index,  # [U], contiguous
    p_output,  # [U, D], contiguous
    num_covered,  # U
    s_self_score,
    s_self_value,
    s_score,
    s_value,
    H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    """One program pools for BLOCK_U patches and BLOCK_H heads."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    o_u, o_h, o_head, m_u, m_h, m_head = locate_heads(num_covered, H, HEAD_DIM, BLOCK_U, BLOCK_H, BLOCK_HEAD_DIM)
    m_block = m_u[:, None, None] & m_head

    b_image = tl.load(p_image_index + o_u, mask=m_u, other=0).to(tl.int64)
    p_scores = p_self_score + (b_image * s_self_score)[:, None] + o_h[None, :]
    b_max = tl.load(p_scores, mask=m_u[:, None] & m_h[None, :], other=0.0).to(tl.float32) * LOG2_E
    b_sum = tl.full([BLOCK_U, BLOCK_H], 1.0, dtype=tl.float32)
    p_values = p_self_value + (b_image * s_self_value)[:, None, None] + o_head
    b_total = tl.load(p_values, mask=m_block, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        b_index = tl.load(p_neighbor_index + o_u.to(tl.int64) * K + slot, mask=m_u, other=-1).to(tl.int64)
        m_index = b_index >= 0
        p_scores = p_score + (b_index * s_score)[:, None] + o_h[None, :]
        m_scores = m_index[:, None] & m_h[None, :]
        b_score = tl.load(p_scores, mask=m_scores, other=float("-inf")).to(tl.float32) * LOG2_E
        p_values = p_value + (b_index * s_value)[:, None, None] + o_head
        b_value = tl.load(p_values, mask=m_index[:, None, None] & m_head, other=0.0)
        b_max, b_sum, b_total = add_to_softmax(b_max, b_sum, b_total, b_score, b_value.to(tl.float32))
    b_output = b_total / b_sum[:, :, None]
    o_output = o_u.to(tl.int64)[:, None, None] * (H * HEAD_DIM) + o_head
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), mask=m_block)


def launch_pool_neighbors(self_score, self_value, score, value, neighbor_index, image_index):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    debug_check_index("neighbor_index", neighbor_index, value.shape[0], lowest=-1)
    debug_check_index("image_index", image_index, self_value.shape[0])
    output = value.new_empty(image_index.shape[0], value.shape[1])
    tensors, indices = [self_score, self_value, score, value], [neighbor_index, image_index]
    return launch_over_heads(_pool_neighbors_kernel, tensors, indices, output, score.shape[1])


def pool_neighbors_cpu(self_score, self_value, score, value, neighbor_index, image_index):
    """The implementation for CPU tensors: plain PyTorch, a block of patches at a time."""
    debug_check_index("neighbor_index", neighbor_index, value.shape[0], lowest=-1)
    debug_check_index("image_index", image_index, self_value.shape[0])
    output = value.new_empty(image_index.shape[0], value.shape[1])
    for block in cpu_blocks(*output.shape):
        own = neighbor_index[block], image_index[block]
        output[block] = pool_neighbors_plain(self_score, self_value, score, value, *own)
    return output


def _empty_output(self_score, self_value, score, value, neighbor_index, image_index):
    return value.new_empty(image_index.shape[0], value.shape[1])


pool_neighbors_op = define_operator(
    "pool_neighbors(Tensor self_score, Tensor self_value, Tensor score, Tensor value, Tensor neighbor_index, "
    "Tensor image_index) -> Tensor",
    cuda=launch_pool_neighbors,
    cpu=pool_neighbors_cpu,
    fake=_empty_output,
)
differentiate_through(pool_neighbors_op, pool_neighbors_plain)
