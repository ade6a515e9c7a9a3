"""gather_tokens at the shapes of training: the context of each image, position embedding added, and backward.

Unique bytes: forward, the index, the kept rows, one position embedding, the output; backward, the index, the gradient,
and the whole [B, N, D] result.
"""

import torch

from benchmarks.operators.cases import Case, Shape, num_bytes, rounding
from dmtjepa.kernels.gather_tokens import (
    gather_tokens_cpu,
    gather_tokens_plain,
    launch_gather_tokens,
    launch_scatter_tokens,
    scatter_tokens_plain,
)


def cases(shape: Shape, device: str, dtype: torch.dtype) -> list[Case]:
    index = shape.masks().context_index.to(device)
    tokens = torch.randn(shape.batch_size, shape.num_patches, shape.dim, device=device).to(dtype)
    position = torch.randn(shape.num_patches, shape.dim, device=device).to(dtype)
    kept = torch.randn(*index.shape, shape.dim, device=device).to(dtype)
    return [
        Case(
            "gather_tokens",
            (tokens, index, position),
            launch_gather_tokens,
            gather_tokens_cpu,
            gather_tokens_plain,
            lambda tokens, index, position: gather_tokens_plain(tokens.float(), index, position.float()),
            num_bytes(index, kept, position, kept),
            rounding(dtype),
        ),
        Case(
            "gather_tokens backward",
            (kept, index, shape.num_patches, dtype),
            launch_scatter_tokens,
            scatter_tokens_plain,
            scatter_tokens_plain,
            lambda grad, index, num_patches, _: scatter_tokens_plain(grad, index, num_patches, torch.float32),
            num_bytes(index, kept, tokens),
            rounding(dtype),
        ),
    ]
