"""aggregate_neighbors and pool_neighbors at the shapes of training: both blocks of the target head.

Unique bytes: queries, own keys and values, keys and values (or scores and values) of the neighbourhood, the neighbour
index, the output.
"""

import torch

from benchmarks.operators.cases import Case, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.aggregate_neighbors import (
    aggregate_neighbors_cpu,
    aggregate_neighbors_plain,
    launch_aggregate_neighbors,
)
from dmtjepa.kernels.pool_neighbors import launch_pool_neighbors, pool_neighbors_cpu, pool_neighbors_plain


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    masks = workload.masks(0, device=device)
    num_covered, num_rows = len(masks.target_unique), len(masks.neighborhood)
    # Four random ones of the eight patches around each covered patch, as rows of the neighbourhood.
    rows, cols = workload.grid_size
    steps = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)], device=device)
    step = steps[torch.rand(num_covered, 8, device=device).argsort(1)[:, :4]]
    image_index = masks.target_unique // workload.num_patches
    n = (masks.target_unique % workload.num_patches)[:, None]
    neighbor = (n // cols + step[..., 0]) % rows * cols + (n % cols + step[..., 1]) % cols
    row_of_patch = torch.zeros(workload.batch_size * workload.num_patches, dtype=torch.int64, device=device)
    row_of_patch[masks.neighborhood] = torch.arange(num_rows, device=device)
    neighbor_index = row_of_patch[image_index[:, None] * workload.num_patches + neighbor]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    query, self_key, self_value = (draw(num_covered, workload.dim) for _ in range(3))
    key, value = (draw(num_rows, workload.dim) for _ in range(2))
    image_score, image_value = draw(workload.batch_size, workload.num_heads), draw(workload.batch_size, workload.dim)
    score = draw(num_rows, workload.num_heads)

    def in_float32(function):
        def reference(*arguments):
            return function(*(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments))

        return reference

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
        ),
        Case(
            "pool_neighbors",
            (image_score, image_value, score, value, neighbor_index, image_index),
            launch_pool_neighbors,
            pool_neighbors_cpu,
            pool_neighbors_plain,
            in_float32(pool_neighbors_plain),
            num_bytes(image_score, image_value, score, value, neighbor_index, image_index, query),
            rounding(dtype),
        ),
    ]
