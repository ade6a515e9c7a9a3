"""The operators of the training step, one file each: reference, plain PyTorch, Triton kernels, CPU implementation.

    gather_tokens         tokens of the kept patches
    embed_patches         uint8 images to normalised, flattened patches, kept patches only
    select_neighbors      the most similar patches of the window around each covered patch
    aggregate_neighbors   attention of one query over a patch and its neighbours, read in place
    pool_neighbors        the same where scores are given (first block: one query per image)
    indexed_smooth_l1     smooth L1 against targets read through an index

The functions of this package are custom operators: a CUDA tensor runs the Triton kernel, a CPU tensor a blocked PyTorch
implementation that needs little memory. `dmtjepa.kernels.plain` holds the same functions in plain PyTorch for any
device. A model chooses once, when it is built:

    operators = kernels.backend("triton")     # or "torch"
    neighbor_index = operators.select_neighbors(h, patches, grid_size)

What the operators offer follows two rules. They are complete, so that they can be used outside DMT-JEPA: every output
that depends continuously on a float input has a gradient, although targets carry none in training. They leave out what
PyTorch expresses as well: a batch of [B, H, W, 3] is passed to `embed_patches` as `images.permute(0, 3, 1, 2)`, which
copies nothing; a position embedding is added with `gather_tokens(tokens, index) + position[index]`; the number of
neighbours found is `(neighbor_index >= 0).sum(1)`.

`dmtjepa.kernels.update_weights` is no operator: it updates the weights of student and teacher in place.

Depends on torch and triton alone. `DMTJEPA_DEBUG=1` also checks every index against its range, which makes the host
wait for the device.
"""

import importlib
import sys
from types import ModuleType

if __name__ == "dmtjepa.kernels":
    from . import plain
    from .aggregate_neighbors import aggregate_neighbors
    from .embed_patches import embed_patches
    from .gather_tokens import gather_tokens
    from .indexed_smooth_l1 import indexed_smooth_l1
    from .pool_neighbors import pool_neighbors
    from .select_neighbors import select_neighbors

    importlib.import_module(".flops", __name__)  # registers formulas for the operators, which exist by now
else:
    # A package on PyPI is called `kernels`, and transformers imports it if it finds one, such as this folder. A second
    # copy of these modules would register the operators again, and PyTorch would free those that are in use.
    sys.modules[__name__] = importlib.import_module("dmtjepa.kernels")

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


def backend(name: str) -> ModuleType:
    """The module that holds the operators of a backend: "triton" (this package) or "torch" (`plain`)."""
    if name == "triton":
        return sys.modules[__name__]
    if name == "torch":
        return plain
    raise ValueError(f'kernels must be "triton" or "torch", got {name!r}')
