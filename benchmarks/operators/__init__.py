"""Benchmarks of operators: one module per operator, whose `cases` are listed here."""

from benchmarks.operators import (
    aggregate_neighbors,
    embed_patches,
    gather_tokens,
    indexed_smooth_l1,
    pool_neighbors,
    select_neighbors,
    update_weights,
)

OPERATORS = {
    "gather_tokens": gather_tokens.cases,
    "embed_patches": embed_patches.cases,
    "select_neighbors": select_neighbors.cases,
    "aggregate_neighbors": aggregate_neighbors.cases,
    "pool_neighbors": pool_neighbors.cases,
    "indexed_smooth_l1": indexed_smooth_l1.cases,
    "update_weights": update_weights.cases,
}
