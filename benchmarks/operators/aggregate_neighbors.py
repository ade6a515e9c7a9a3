"""aggregate_neighbors at the shapes of training: the second block of the target head.

Unique bytes: queries, own keys and values, keys and values of the neighbourhood, the neighbour index, the output.
"""

import torch

from benchmarks.operators.cases import Case, draw_neighbors, in_float32, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.aggregate_neighbors import (
    aggregate_neighbors_cpu,
    aggregate_neighbors_plain,
    launch_aggregate_neighbors,
)


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    masks = workload.masks(0, device=device)
    neighbor_index = draw_neighbors(masks, workload)

    def draw(num_tokens: int) -> torch.Tensor:
        return torch.randn(num_tokens, workload.dim, device=device).to(dtype)

    query, self_key, self_value = (draw(len(masks.target_unique)) for _ in range(3))
    key, value = (draw(len(masks.neighborhood)) for _ in range(2))
    return [
        Case(
            "aggregate_neighbors",
            (query, self_key, self_value, key, value, neighbor_index, workload.num_heads),
            launch_aggregate_neighbors,
            aggregate_neighbors_cpu,
            aggregate_neighbors_plain,
            in_float32(aggregate_neighbors_plain),
            num_bytes(query, self_key, self_value, key, value, neighbor_index, query),
            rounding(dtype),
        )
    ]
