"""The operators of the training step, one file each: reference, plain PyTorch, CPU implementation, Triton kernels.

    gather_tokens         tokens of the kept patches, position embedding added
    embed_patches         uint8 images to normalised patch rows, kept patches only
    select_neighbors      the most similar patches of the window around each covered patch
    aggregate_neighbors   attention of one query over a patch and its neighbours, read in place
    pool_neighbors        the same where scores are given (first block: one query per image)
    indexed_smooth_l1     smooth L1 against targets read through an index

The functions of this package are custom operators: a CUDA tensor runs the Triton kernel, a CPU tensor a blocked PyTorch
implementation with little transient memory. `dmtjepa.kernels.plain` holds the same functions in plain PyTorch for any
device. A model chooses once, when it is built:

    operators = kernels.backend("triton")     # or "torch"
    neighbor_index, count = operators.select_neighbors(h, patches, grid_size)

Depends on torch and triton alone. `DMTJEPA_DEBUG=1` also checks every index against its range, which makes the host
wait for the device.
"""

import importlib
import sys
from types import ModuleType

from . import plain
from .aggregate_neighbors import aggregate_neighbors, pool_neighbors
from .embed_patches import embed_patches
from .gather_tokens import gather_tokens
from .indexed_smooth_l1 import indexed_smooth_l1
from .select_neighbors import select_neighbors

__all__ = [
    "aggregate_neighbors",
    "backend",
    "embed_patches",
    "gather_tokens",
    "indexed_smooth_l1",
    "plain",
    "pool_neighbors",
    "select_neighbors",
]


importlib.import_module(".flops", __name__)  # its formulas are registered for operators that exist by now


def backend(name: str) -> ModuleType:
    """The module that holds the operators of a backend: "triton" (this package) or "torch" (`plain`)."""
    if name == "triton":
        return sys.modules[__name__]
    if name == "torch":
        return plain
    raise ValueError(f'kernels must be "triton" or "torch", got {name!r}')
