"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`, which cannot look into them.

As the counter does elsewhere, a multiplication and its addition count 2, and pointwise arithmetic counts nothing.
Shape letters are those of the operators' files.
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
def _select_neighbors(h, patches, rows, columns, num_neighbors, window, *_arguments, **_keywords) -> int:
    """Squared norms of window^2 rows and their products with the row in the middle."""
    return 2 * (2 * window**2 - 1) * patches[0] * h[2]


@register_flop_formula(OPERATORS.aggregate_neighbors)
def _aggregate_neighbors(query, self_key, self_value, key, value, index, *_arguments, **_keywords) -> int:
    """Scores of K + 1 keys, and their values weighted."""
    return 4 * (index[1] + 1) * query[0] * query[1]


@register_flop_formula(OPERATORS.pool_neighbors)
def _pool_neighbors(self_score, self_value, score, value, index, *_arguments, **_keywords) -> int:
    """K + 1 values weighted."""
    return 2 * (index[1] + 1) * index[0] * value[1]
