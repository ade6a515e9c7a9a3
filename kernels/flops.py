"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`, which cannot look into them.

As in the counter's own formulas, a multiplication and its addition count 2, and pointwise arithmetic counts nothing.
The formulas get shapes in place of tensors.
"""

from torch import ops
from torch.utils.flop_counter import register_flop_formula

OPERATORS = ops.dmtjepa


@register_flop_formula(
    [
        OPERATORS.gather_tokens,
        OPERATORS.scatter_tokens,
        OPERATORS.embed_patches,
        OPERATORS.indexed_smooth_l1,
        OPERATORS.indexed_smooth_l1_backward,
    ]
)
def _pointwise(*_arguments, out_shape: object = None, **_keywords: object) -> int:
    return 0


@register_flop_formula(OPERATORS.select_neighbors)
def _select_neighbors(h, patches, rows, cols, num_neighbors, window, *_arguments, **_keywords) -> int:
    """Squared norms of the window^2 patches, and products of the one in the middle with the others."""
    return 2 * (2 * window**2 - 1) * patches[0] * h[2]


@register_flop_formula(OPERATORS.aggregate_neighbors)
def _aggregate_neighbors(query, self_key, self_value, key, value, neighbor_index, *_arguments, **_keywords) -> int:
    """Scores of K + 1 keys, and their values weighted."""
    return 4 * (neighbor_index[1] + 1) * query[0] * query[1]


@register_flop_formula(OPERATORS.pool_neighbors)
def _pool_neighbors(self_score, self_value, score, value, neighbor_index, *_arguments, **_keywords) -> int:
    """K + 1 values weighted."""
    return 2 * (neighbor_index[1] + 1) * neighbor_index[0] * value[1]
