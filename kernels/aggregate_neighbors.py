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


# CPU: the working set of a block, a few [block, D] arrays, stays within a core's L2 cache.
_BLOCK_ELEMENTS = 2**16


@torch.library.custom_op("dmtjepa::aggregate_neighbors", mutates_args=(), device_types="cpu")
def _aggregate_neighbors(
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


@_aggregate_neighbors.register_fake
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


@torch.library.custom_op("dmtjepa::pool_neighbors", mutates_args=(), device_types="cpu")
def _pool_neighbors(
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


@_pool_neighbors.register_fake
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


_aggregate_neighbors.register_autograd(_aggregate_backward, setup_context=_aggregate_setup)
_pool_neighbors.register_autograd(_pool_backward, setup_context=_pool_setup)


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
    return _aggregate_neighbors(query, self_key, self_value, key, value, neighbor_index, num_heads)


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
    return _pool_neighbors(self_score, self_value, score, value, neighbor_index, image_index)
