"""aggregate_neighbors: attention of one query per patch over the patch itself and its K neighbours.

Keys and values are projected once per patch and read in place through the neighbour index, so that no [U, K, D] array
is ever built.
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


def aggregate_neighbors(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    """Multi-head attention of one query per covered patch over its own key and its neighbours' keys.

    For each covered patch u and each head, with j over the neighbours neighbor_index[u] that are not -1:

        output[u] = softmax(query[u] . [self_key[u], key[j], ...] / sqrt(D / H)) . [self_value[u], value[j], ...]

    It is the second block of DMT-JEPA's aggregation head (section 3.2 of the paper).

    Args:
        query: [U, D], bfloat16, float16 or float32 (float64 on the CPU), one per covered patch.
        self_key: [U, D] in the dtype of `query`, the key of each covered patch itself.
        self_value: [U, D] in the dtype of `query`, its value.
        key: [R, D] in the dtype of `query`, one per patch of the neighbourhood.
        value: [R, D] in the dtype of `query`, likewise.
        neighbor_index: [U, K], int32 or int64 in [0, R), indices into `key` and `value`; -1 marks a missing neighbour.
        num_heads: H; the head size D / H is a multiple of 8.

    Returns:
        [U, D] in the dtype of `query`. Scores and sums are float32. Differentiable in the five float tensors.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        IndexError: in debug mode, an index out of range.
    """
    check_tensor("query", query, 2, FLOAT_DTYPES)
    check_tensor("neighbor_index", neighbor_index, 2, INDEX_DTYPES)
    check_shape("key", key, (key.shape[0], query.shape[1]), "[R, D]")
    check_shape("value", value, key.shape, "[R, D]")
    check_shape("self_key", self_key, query.shape, "[U, D]")
    check_shape("self_value", self_value, query.shape, "[U, D]")
    check_shape("neighbor_index", neighbor_index, (query.shape[0], neighbor_index.shape[1]), "[U, K]")
    others = {"self_key": self_key, "self_value": self_value, "key": key, "value": value}
    check_same_device("query", query, **others, neighbor_index=neighbor_index)
    for name, tensor in others.items():
        check_same_dtype(name, tensor, "query", query)
    check_heads(query.shape[1], num_heads)
    check_kernel_dtype("query", query)
    return aggregate_neighbors_op(query, self_key, self_value, key, value, neighbor_index, num_heads)


def aggregate_neighbors_reference(query, self_key, self_value, key, value, neighbor_index, num_heads):
    """The definition, one patch and one head at a time."""
    head_dim = query.shape[1] // num_heads
    query, self_key, self_value, key, value = widen(query, self_key, self_value, key, value)
    output = torch.empty_like(query)
    for u, neighbors in enumerate(neighbor_index.tolist()):
        present = [j for j in neighbors if j >= 0]
        for h in range(num_heads):
            head = slice(h * head_dim, (h + 1) * head_dim)
            keys = torch.stack([self_key[u, head], *(key[j, head] for j in present)])
            values = torch.stack([self_value[u, head], *(value[j, head] for j in present)])
            weight = torch.softmax(keys @ query[u, head] / math.sqrt(head_dim), dim=0)
            output[u, head] = weight @ values
    return output


def aggregate_neighbors_plain(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    """Vectorised PyTorch on any device; one neighbour at a time, so that only [U, D] tokens are ever gathered."""
    wide = accumulation_dtype(query.dtype)
    scaled = query.to(wide) * (query.shape[1] // num_heads) ** -0.5

    def score(keys: Tensor) -> Tensor:
        return (scaled * keys.to(wide)).unflatten(1, (num_heads, -1)).sum(2)

    index = neighbor_index.clamp_min(0)
    scores = [score(key.index_select(0, index[:, j])) for j in range(index.shape[1])]
    weight = softmax_weights(score(self_key), scores, neighbor_index)
    return weighted_sum(weight, self_value, value, index).to(query.dtype)


@triton.jit(do_not_specialize=["num_covered"])
def _aggregate_neighbors_kernel(
    p_query,  # [U, D], strides (s_query, 1)
    p_self_key,  # [U, D], strides (s_self_key, 1)
    p_self_value,  # [U, D], strides (s_self_value, 1)
    p_key,  # [R, D], strides (s_key, 1)
    p_value,  # [R, D], strides (s_value, 1)
    p_neighbor_index,  # [U, K], contiguous
    p_output,  # [U, D], contiguous
    num_covered,  # U
    s_query,
    s_self_key,
    s_self_value,
    s_key,
    s_value,
    scale,  # log2(e) / sqrt(head size)
    H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HEAD_DIM: tl.constexpr,
):
    """One program attends for BLOCK_U patches and BLOCK_H heads; adjacent patches share neighbours in the caches."""
    o_u, _, o_head, m_u, _, m_head = locate_heads(num_covered, H, HEAD_DIM, BLOCK_U, BLOCK_H, BLOCK_HEAD_DIM)
    m_block = m_u[:, None, None] & m_head
    o_wide = o_u.to(tl.int64)[:, None, None]

    b_query = tl.load(p_query + o_wide * s_query + o_head, mask=m_block, other=0.0).to(tl.float32) * scale
    b_self_key = tl.load(p_self_key + o_wide * s_self_key + o_head, mask=m_block, other=0.0)
    b_max = tl.sum(b_query * b_self_key.to(tl.float32), axis=2)  # [BLOCK_U, BLOCK_H]
    b_sum = tl.full([BLOCK_U, BLOCK_H], 1.0, dtype=tl.float32)
    b_total = tl.load(p_self_value + o_wide * s_self_value + o_head, mask=m_block, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        b_index = tl.load(p_neighbor_index + o_u.to(tl.int64) * K + slot, mask=m_u, other=-1).to(tl.int64)
        m_index = b_index >= 0
        m_neighbor = m_index[:, None, None] & m_head
        b_key = tl.load(p_key + (b_index * s_key)[:, None, None] + o_head, mask=m_neighbor, other=0.0)
        b_value = tl.load(p_value + (b_index * s_value)[:, None, None] + o_head, mask=m_neighbor, other=0.0)
        b_score = tl.where(m_index[:, None], tl.sum(b_query * b_key.to(tl.float32), axis=2), float("-inf"))
        b_max, b_sum, b_total = add_to_softmax(b_max, b_sum, b_total, b_score, b_value.to(tl.float32))
    b_output = b_total / b_sum[:, :, None]
    tl.store(p_output + o_wide * (H * HEAD_DIM) + o_head, b_output.to(p_output.dtype.element_ty), mask=m_block)


def launch_aggregate_neighbors(query, self_key, self_value, key, value, neighbor_index, num_heads):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    debug_check_index("neighbor_index", neighbor_index, key.shape[0], lowest=-1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    tensors = [query, self_key, self_value, key, value]
    scale = math.log2(math.e) / math.sqrt(query.shape[1] // num_heads)
    return launch_over_heads(_aggregate_neighbors_kernel, tensors, [neighbor_index], output, num_heads, scale)


def aggregate_neighbors_cpu(query, self_key, self_value, key, value, neighbor_index, num_heads):
    """The implementation for CPU tensors: plain PyTorch, a block of patches at a time."""
    debug_check_index("neighbor_index", neighbor_index, key.shape[0], lowest=-1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for block in cpu_blocks(*query.shape):
        own = query[block], self_key[block], self_value[block]
        output[block] = aggregate_neighbors_plain(*own, key, value, neighbor_index[block], num_heads)
    return output


aggregate_neighbors_op = define_operator(
    "aggregate_neighbors(Tensor query, Tensor self_key, Tensor self_value, Tensor key, Tensor value, "
    "Tensor neighbor_index, SymInt num_heads) -> Tensor",
    cuda=launch_aggregate_neighbors,
    cpu=aggregate_neighbors_cpu,
    fake=lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
)
differentiate_through(aggregate_neighbors_op, aggregate_neighbors_plain)
