"""The operators in plain PyTorch, under their public names but without the argument checks.

They run on any device, and autograd and `torch.compile` see through them. The Triton kernels have to beat them.
"""

from .aggregate_neighbors import aggregate_neighbors_plain as aggregate_neighbors
from .embed_patches import embed_patches_plain as embed_patches
from .gather_tokens import gather_tokens_plain as gather_tokens
from .indexed_smooth_l1 import indexed_smooth_l1_plain as indexed_smooth_l1
from .pool_neighbors import pool_neighbors_plain as pool_neighbors
from .select_neighbors import select_neighbors_plain as select_neighbors

__all__ = [
    "aggregate_neighbors",
    "embed_patches",
    "gather_tokens",
    "indexed_smooth_l1",
    "pool_neighbors",
    "select_neighbors",
]
