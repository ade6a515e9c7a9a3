"""gather_tokens at the shapes of training: the context of each image, forward and backward.

Unique bytes: forward, the index, the kept tokens, the output; backward, the index, the gradient, and the whole
[B, N, D] result.
"""

import torch

from benchmarks.operators.cases import Case, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.gather_tokens import (
    gather_tokens_cpu,
    gather_tokens_plain,
    launch_gather_tokens,
    launch_scatter_tokens,
    scatter_tokens_plain,
)


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    index = workload.masks(0, device=device).context_index
    tokens = torch.randn(workload.batch_size, workload.num_patches, workload.dim, device=device).to(dtype)
    kept = torch.randn(*index.shape, workload.dim, device=device).to(dtype)
    return [
        Case(
            "gather_tokens",
            (tokens, index),
            launch_gather_tokens,
            gather_tokens_cpu,
            gather_tokens_plain,
            lambda tokens, index: gather_tokens_plain(tokens.float(), index),
            num_bytes(index, kept, kept),
            rounding(dtype),
        ),
        Case(
            "gather_tokens backward",
            (kept, index, workload.num_patches),
            launch_scatter_tokens,
            scatter_tokens_plain,
            scatter_tokens_plain,
            lambda grad, index, num_patches: scatter_tokens_plain(grad.float(), index, num_patches),
            num_bytes(index, kept, tokens),
            rounding(dtype),
        ),
    ]
