"""aggregate_neighbors, pool_neighbors: attention of one query over a patch's own key and its K neighbours.

Keys and values are computed once per patch and read in place through the neighbour index; nothing is gathered.

    query, self_key, self_value  [U, D]   one per covered patch; D = num_heads * head size
    key, value                   [R, D]   one per patch of the neighbourhood
    neighbor_index               [U, K]   int32 or int64 rows of key and value; -1 marks a missing neighbour
    output                       [U, D]   per head: softmax(query . [self_key, key_j...] / sqrt(head size))
                                          . [self_value, value_j...]

In the first block of the aggregation the query is one per image, so the scores are given instead of queries and keys
(`pool_neighbors`; already scaled):

    self_score   [B, H]    of the image's own token
    self_value   [B, D]
    score        [R, H]    of each patch of the neighbourhood
    value        [R, D]
    image_index  [U]       int32 or int64, the image of each covered patch
    output       [U, D]    per head: softmax([self_score[b], score_j...]) . [self_value[b], value_j...]

Targets carry no gradient, so the training step never runs a backward pass here; the operators have one all the same, in
plain PyTorch.
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
from .launch import contiguous_rows, launch


def aggregate_neighbors_reference(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    """The definition, one patch and one head at a time."""
    head_dim = query.shape[1] // num_heads
    query, self_key, self_value, key, value = _widen(query, self_key, self_value, key, value)
    output = torch.empty_like(query)
    for u, neighbors in enumerate(neighbor_index.tolist()):
        present = [r for r in neighbors if r >= 0]
        for head in range(num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            keys = torch.stack([self_key[u, at], *(key[r, at] for r in present)])
            values = torch.stack([self_value[u, at], *(value[r, at] for r in present)])
            weight = torch.softmax(keys @ query[u, at] / math.sqrt(head_dim), dim=0)
            output[u, at] = weight @ values
    return output


def pool_neighbors_reference(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    """The definition, one patch and one head at a time."""
    num_heads = score.shape[1]
    head_dim = value.shape[1] // num_heads
    self_score, self_value, score, value = _widen(self_score, self_value, score, value)
    output = value.new_empty(len(image_index), value.shape[1])
    for u, (neighbors, b) in enumerate(zip(neighbor_index.tolist(), image_index.tolist(), strict=True)):
        present = [r for r in neighbors if r >= 0]
        for head in range(num_heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            scores = torch.stack([self_score[b, head], *(score[r, head] for r in present)])
            values = torch.stack([self_value[b, at], *(value[r, at] for r in present)])
            output[u, at] = torch.softmax(scores, dim=0) @ values
    return output


def _widen(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in tensors]


def _neighbor_weights(self_score: Tensor, scores: list[Tensor], neighbor_index: Tensor) -> Tensor:
    """Softmax over {self, K neighbours} of scores [U, H] each, [K+1, U, H]; a missing neighbour has weight 0."""
    masked = [s.masked_fill(neighbor_index[:, j, None] < 0, -math.inf) for j, s in enumerate(scores)]
    return torch.softmax(torch.stack([self_score, *masked]), dim=0)


def _weighted_sum(weight: Tensor, self_value: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """weight [K+1, U, H], self_value [U, D], value [R, D], rows [U, K] -> [U, D], in float32 or wider."""
    num_heads = weight.shape[2]
    wide = accumulation_dtype(value.dtype)
    total = weight[0, :, :, None] * self_value.to(wide).unflatten(1, (num_heads, -1))
    for j in range(rows.shape[1]):
        other = value.index_select(0, rows[:, j]).to(wide).unflatten(1, (num_heads, -1))
        total = total + weight[j + 1, :, :, None] * other
    return total.flatten(1)


def _attention_weights(
    query: Tensor, self_key: Tensor, key: Tensor, neighbor_index: Tensor, rows: Tensor, num_heads: int
) -> Tensor:
    """Attention weights [K+1, U, H] of {self, K neighbours}, in float32 or wider."""
    wide = accumulation_dtype(query.dtype)
    scaled = query.to(wide) * (query.shape[1] // num_heads) ** -0.5

    def score(keys: Tensor) -> Tensor:
        return (scaled * keys.to(wide)).unflatten(1, (num_heads, -1)).sum(2)

    scores = [score(key.index_select(0, rows[:, j])) for j in range(rows.shape[1])]
    return _neighbor_weights(score(self_key), scores, neighbor_index)


def aggregate_neighbors_plain(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    """Vectorised PyTorch on any device; one neighbour at a time, so that only [U, D] rows are ever gathered."""
    rows = neighbor_index.clamp_min(0)
    weight = _attention_weights(query, self_key, key, neighbor_index, rows, num_heads)
    return _weighted_sum(weight, self_value, value, rows).to(query.dtype)


def pool_neighbors_plain(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    """Vectorised PyTorch on any device; one neighbour at a time, so that only [U, D] rows are ever gathered."""
    rows = neighbor_index.clamp_min(0)
    weight = _pool_weights(self_score, score, neighbor_index, rows, image_index)
    return _weighted_sum(weight, self_value.index_select(0, image_index), value, rows).to(value.dtype)


def _pool_weights(
    self_score: Tensor, score: Tensor, neighbor_index: Tensor, rows: Tensor, image_index: Tensor
) -> Tensor:
    """Weights [K+1, U, H] of {the image's token, K neighbours}, in float32 or wider."""
    wide = accumulation_dtype(score.dtype)
    scores = [score.index_select(0, rows[:, j]).to(wide) for j in range(rows.shape[1])]
    return _neighbor_weights(self_score.index_select(0, image_index).to(wide), scores, neighbor_index)


@triton.jit
def _add_to_softmax(b_max, b_sum, b_total, b_score, b_value):
    """One more value of an online softmax: scores [U, H] in base 2, totals [U, H, d] relative to exp2(b_max)."""
    b_new_max = tl.maximum(b_max, b_score)
    b_old = tl.exp2(b_max - b_new_max)
    b_weight = tl.exp2(b_score - b_new_max)
    b_total = b_total * b_old[:, :, None] + b_value * b_weight[:, :, None]
    return b_new_max, b_sum * b_old + b_weight, b_total


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
    num_blocks_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    o_u = tl.program_id(0) // num_blocks_h * BLOCK_U + tl.arange(0, BLOCK_U)
    o_h = tl.program_id(0) % num_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_e = tl.arange(0, BLOCK_HEAD_DIM)
    m_u = o_u < num_covered
    o_head = (o_h * HEAD_DIM)[None, :, None] + o_e[None, None, :]
    m_head = (o_h < H)[None, :, None] & (o_e < HEAD_DIM)[None, None, :]
    m_tile = m_u[:, None, None] & m_head
    o_wide = o_u.to(tl.int64)[:, None, None]

    b_query = tl.load(p_query + o_wide * s_query + o_head, mask=m_tile, other=0.0).to(tl.float32) * scale
    b_self_key = tl.load(p_self_key + o_wide * s_self_key + o_head, mask=m_tile, other=0.0)
    b_max = tl.sum(b_query * b_self_key.to(tl.float32), axis=2)  # [BLOCK_U, BLOCK_H]
    b_sum = tl.full([BLOCK_U, BLOCK_H], 1.0, dtype=tl.float32)
    b_total = tl.load(p_self_value + o_wide * s_self_value + o_head, mask=m_tile, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        b_r = tl.load(p_neighbor_index + o_u.to(tl.int64) * K + slot, mask=m_u, other=-1).to(tl.int64)
        m_r = b_r >= 0
        m_neighbor = m_r[:, None, None] & m_head
        b_key = tl.load(p_key + (b_r * s_key)[:, None, None] + o_head, mask=m_neighbor, other=0.0)
        b_value = tl.load(p_value + (b_r * s_value)[:, None, None] + o_head, mask=m_neighbor, other=0.0)
        b_score = tl.where(m_r[:, None], tl.sum(b_query * b_key.to(tl.float32), axis=2), float("-inf"))
        b_max, b_sum, b_total = _add_to_softmax(b_max, b_sum, b_total, b_score, b_value.to(tl.float32))
    b_output = b_total / b_sum[:, :, None]
    tl.store(p_output + o_wide * (H * HEAD_DIM) + o_head, b_output.to(p_output.dtype.element_ty), mask=m_tile)


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
    num_blocks_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    o_u = tl.program_id(0) // num_blocks_h * BLOCK_U + tl.arange(0, BLOCK_U)
    o_h = tl.program_id(0) % num_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_e = tl.arange(0, BLOCK_HEAD_DIM)
    m_u = o_u < num_covered
    m_h = o_h < H
    o_head = (o_h * HEAD_DIM)[None, :, None] + o_e[None, None, :]
    m_head = m_h[None, :, None] & (o_e < HEAD_DIM)[None, None, :]
    m_tile = m_u[:, None, None] & m_head

    b_image = tl.load(p_image_index + o_u, mask=m_u, other=0).to(tl.int64)
    p_scores = p_self_score + (b_image * s_self_score)[:, None] + o_h[None, :]
    b_max = tl.load(p_scores, mask=m_u[:, None] & m_h[None, :], other=0.0).to(tl.float32) * LOG2_E
    b_sum = tl.full([BLOCK_U, BLOCK_H], 1.0, dtype=tl.float32)
    p_values = p_self_value + (b_image * s_self_value)[:, None, None] + o_head
    b_total = tl.load(p_values, mask=m_tile, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        b_r = tl.load(p_neighbor_index + o_u.to(tl.int64) * K + slot, mask=m_u, other=-1).to(tl.int64)
        m_r = b_r >= 0
        p_scores = p_score + (b_r * s_score)[:, None] + o_h[None, :]
        b_score = tl.load(p_scores, mask=m_r[:, None] & m_h[None, :], other=float("-inf")).to(tl.float32) * LOG2_E
        p_values = p_value + (b_r * s_value)[:, None, None] + o_head
        b_value = tl.load(p_values, mask=m_r[:, None, None] & m_head, other=0.0)
        b_max, b_sum, b_total = _add_to_softmax(b_max, b_sum, b_total, b_score, b_value.to(tl.float32))
    b_output = b_total / b_sum[:, :, None]
    o_output = o_u.to(tl.int64)[:, None, None] * (H * HEAD_DIM) + o_head
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), mask=m_tile)


# A tile of 16 patches and 256 columns gives each of 128 threads four independent 16-byte loads in 16-bit formats.
_BLOCK_U = 16
_BLOCK_COLUMNS = 256


def _head_blocks(dim: int, num_heads: int) -> dict[str, int]:
    """Head sizes are padded to a power of two: masked lanes load nothing, so padding costs no traffic."""
    block_head_dim = triton.next_power_of_2(dim // num_heads)
    block_heads = max(1, min(triton.next_power_of_2(num_heads), _BLOCK_COLUMNS // block_head_dim))
    return {
        "H": num_heads,
        "HEAD_DIM": dim // num_heads,
        "BLOCK_U": _BLOCK_U,
        "BLOCK_H": block_heads,
        "BLOCK_HEAD_DIM": block_head_dim,
    }


def launch_aggregate_neighbors(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    debug_check_index("neighbor_index", neighbor_index, key.shape[0], lowest=-1)
    num_covered, dim = query.shape
    tensors = [contiguous_rows(tensor) for tensor in (query, self_key, self_value, key, value)]
    output = torch.empty((num_covered, dim), dtype=query.dtype, device=query.device)
    blocks = _head_blocks(dim, num_heads)
    launch(
        _aggregate_neighbors_kernel,
        triton.cdiv(num_covered, _BLOCK_U) * triton.cdiv(num_heads, blocks["BLOCK_H"]),
        *tensors,
        neighbor_index.contiguous(),
        output,
        num_covered,
        *(tensor.stride(0) for tensor in tensors),
        math.log2(math.e) / math.sqrt(dim // num_heads),
        K=neighbor_index.shape[1],
        **blocks,
    )
    return output


def launch_pool_neighbors(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    debug_check_index("neighbor_index", neighbor_index, value.shape[0], lowest=-1)
    debug_check_index("image_index", image_index, self_value.shape[0])
    num_covered, dim = image_index.shape[0], value.shape[1]
    tensors = [contiguous_rows(tensor) for tensor in (self_score, self_value, score, value)]
    output = torch.empty((num_covered, dim), dtype=value.dtype, device=value.device)
    blocks = _head_blocks(dim, score.shape[1])
    launch(
        _pool_neighbors_kernel,
        triton.cdiv(num_covered, _BLOCK_U) * triton.cdiv(score.shape[1], blocks["BLOCK_H"]),
        *tensors,
        neighbor_index.contiguous(),
        image_index.contiguous(),
        output,
        num_covered,
        *(tensor.stride(0) for tensor in tensors),
        K=neighbor_index.shape[1],
        **blocks,
    )
    return output


# CPU: the working set of a block, a few [block, D] arrays, stays within a core's L2 cache.
_BLOCK_ELEMENTS = 2**16


def aggregate_neighbors_cpu(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    debug_check_index("neighbor_index", neighbor_index, key.shape[0], lowest=-1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    block = max(1, _BLOCK_ELEMENTS // query.shape[1])
    for start in range(0, len(query), block):
        at = slice(start, start + block)
        output[at] = aggregate_neighbors_plain(
            query[at], self_key[at], self_value[at], key, value, neighbor_index[at], num_heads
        )
    return output


aggregate_neighbors_op = torch.library.custom_op(
    "dmtjepa::aggregate_neighbors", launch_aggregate_neighbors, mutates_args=(), device_types="cuda"
)
aggregate_neighbors_op.register_kernel("cpu", aggregate_neighbors_cpu)


@aggregate_neighbors_op.register_fake
def _(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def pool_neighbors_cpu(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    debug_check_index("neighbor_index", neighbor_index, value.shape[0], lowest=-1)
    debug_check_index("image_index", image_index, self_value.shape[0])
    output = value.new_empty(image_index.shape[0], value.shape[1])
    block = max(1, _BLOCK_ELEMENTS // value.shape[1])
    for start in range(0, len(image_index), block):
        at = slice(start, start + block)
        output[at] = pool_neighbors_plain(self_score, self_value, score, value, neighbor_index[at], image_index[at])
    return output


pool_neighbors_op = torch.library.custom_op(
    "dmtjepa::pool_neighbors", launch_pool_neighbors, mutates_args=(), device_types="cuda"
)
pool_neighbors_op.register_kernel("cpu", pool_neighbors_cpu)


@pool_neighbors_op.register_fake
def _(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    return value.new_empty(image_index.shape[0], value.shape[1])


def _sum_rows(index: Tensor, num_rows: int, values: list[Tensor], keep: Tensor | None = None) -> Tensor:
    """Sum of values[j][u] into row index[u, j] of [num_rows, ...], without those where `keep` [U, K] is False."""
    total = values[0].new_zeros(num_rows, *values[0].shape[1:])
    for j, rows in enumerate(values):
        if keep is not None:
            rows = rows * keep[:, j].view(-1, *[1] * (rows.ndim - 1))
        total = total.index_add(0, index[:, j], rows)
    return total


def _softmax_backward(weight: Tensor, grad: Tensor, values: list[Tensor]) -> Tensor:
    """Gradient of the K+1 scores [K+1, U, H] from that of the output [U, H, d] and the values [U, H, d] each."""
    grad_weight = torch.stack([(grad * v).sum(2) for v in values])
    return weight * (grad_weight - (weight * grad_weight).sum(0))


def _aggregate_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.num_heads = inputs[6]


def _aggregate_backward(ctx, grad: Tensor):
    query, self_key, self_value, key, value, neighbor_index = ctx.saved_tensors
    wide = accumulation_dtype(query.dtype)
    rows, present = neighbor_index.clamp_min(0), neighbor_index >= 0
    heads = (ctx.num_heads, -1)
    num_neighbors = rows.shape[1]
    weight = _attention_weights(query, self_key, key, neighbor_index, rows, ctx.num_heads)
    grad = grad.to(wide).unflatten(1, heads)

    def per_neighbor(own: Tensor, table: Tensor) -> list[Tensor]:
        gathered = [table.index_select(0, rows[:, j]) for j in range(num_neighbors)]
        return [tensor.to(wide).unflatten(1, heads) for tensor in (own, *gathered)]

    scale = grad.shape[2] ** -0.5
    grad_score = scale * _softmax_backward(weight, grad, per_neighbor(self_value, value))
    wide_query = query.to(wide).unflatten(1, heads)
    grad_query = sum(s[:, :, None] * k for s, k in zip(grad_score, per_neighbor(self_key, key), strict=True))
    grad_keys = [(s[:, :, None] * wide_query).flatten(1) for s in grad_score]
    grad_values = [(w[:, :, None] * grad).flatten(1) for w in weight]
    grad_key = _sum_rows(rows, key.shape[0], grad_keys[1:], present)
    grad_value = _sum_rows(rows, value.shape[0], grad_values[1:], present)
    grads = (grad_query.flatten(1), grad_keys[0], grad_values[0], grad_key, grad_value)
    return *(g.to(query.dtype) for g in grads), None, None


def _pool_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _pool_backward(ctx, grad: Tensor):
    self_score, self_value, score, value, neighbor_index, image_index = ctx.saved_tensors
    wide = accumulation_dtype(value.dtype)
    rows, present = neighbor_index.clamp_min(0), neighbor_index >= 0
    heads = (score.shape[1], -1)
    weight = _pool_weights(self_score, score, neighbor_index, rows, image_index)
    grad = grad.to(wide).unflatten(1, heads)
    gathered = [value.index_select(0, rows[:, j]) for j in range(rows.shape[1])]
    values = [v.to(wide).unflatten(1, heads) for v in (self_value.index_select(0, image_index), *gathered)]
    grad_scores = _softmax_backward(weight, grad, values)
    grad_values = [(w[:, :, None] * grad).flatten(1) for w in weight]
    image = image_index[:, None]
    return (
        _sum_rows(image, self_score.shape[0], [grad_scores[0]]).to(self_score.dtype),
        _sum_rows(image, self_value.shape[0], [grad_values[0]]).to(self_value.dtype),
        _sum_rows(rows, score.shape[0], list(grad_scores[1:]), present).to(score.dtype),
        _sum_rows(rows, value.shape[0], grad_values[1:], present).to(value.dtype),
        None,
        None,
    )


aggregate_neighbors_op.register_autograd(_aggregate_backward, setup_context=_aggregate_setup)
pool_neighbors_op.register_autograd(_pool_backward, setup_context=_pool_setup)


def check_aggregate_arguments(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> None:
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


def check_pool_arguments(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> None:
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


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless `dim` divides into `num_heads` heads whose size is a multiple of 8."""
    if num_heads < 1 or dim % num_heads or dim // num_heads % 8:
        raise ValueError(f"a width of {dim} does not divide into {num_heads} heads of a size that is a multiple of 8")


def aggregate_neighbors(
    query: Tensor,
    self_key: Tensor,
    self_value: Tensor,
    key: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    num_heads: int,
) -> Tensor:
    """Multi-head attention of one query per covered patch over {its own key, its K neighbours' keys}.

    Args:
        query, self_key, self_value: [U, D], bf16, fp16 or fp32 (and float64 on the CPU), one dtype for all five.
        key, value: [R, D], of the neighbourhood's patches.
        neighbor_index: [U, K], int32 or int64 rows of `key` and `value`; -1 leaves the slot out.
        num_heads: H; the head size D / H is a multiple of 8. Scores are scaled by its inverse square root.

    Returns:
        [U, D] in the dtype of `query`; scores and sums are float32. Differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: in debug mode, an index out of range.
    """
    check_aggregate_arguments(query, self_key, self_value, key, value, neighbor_index, num_heads)
    check_kernel_dtype("query", query)
    return aggregate_neighbors_op(query, self_key, self_value, key, value, neighbor_index, num_heads)


def pool_neighbors(
    self_score: Tensor,
    self_value: Tensor,
    score: Tensor,
    value: Tensor,
    neighbor_index: Tensor,
    image_index: Tensor,
) -> Tensor:
    """Softmax pooling of {the image's token, K neighbours} by scores that are given, one per patch and head.

    Args:
        self_score: [B, H], already scaled, any float dtype. self_value: [B, D].
        score: [R, H], already scaled, in the dtype of `self_score`. value: [R, D], in the dtype of `self_value`.
        neighbor_index: [U, K], int32 or int64 rows of `score` and `value`; -1 leaves the slot out.
        image_index: [U], int32 or int64 in [0, B), the image of each covered patch.

    Returns:
        [U, D] in the dtype of `value`; weights and sums are float32. Differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: in debug mode, an index out of range.
    """
    check_pool_arguments(self_score, self_value, score, value, neighbor_index, image_index)
    check_kernel_dtype("value", value)
    return pool_neighbors_op(self_score, self_value, score, value, neighbor_index, image_index)
