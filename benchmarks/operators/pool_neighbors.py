"""pool_neighbors at the shapes of training: the first block of the target head.

Unique bytes: scores and values of the images and of the neighbourhood, both indices, the output.
"""

import torch

from benchmarks.operators.cases import Case, draw_neighbors, in_float32, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.pool_neighbors import launch_pool_neighbors, pool_neighbors_cpu, pool_neighbors_plain


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    masks = workload.masks(0, device=device)
    neighbor_index = draw_neighbors(masks, workload)
    image_index = masks.target_unique // workload.num_patches

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    self_score, self_value = draw(workload.batch_size, workload.num_heads), draw(workload.batch_size, workload.dim)
    num_patches = len(masks.neighborhood)
    score, value = draw(num_patches, workload.num_heads), draw(num_patches, workload.dim)
    inputs = (self_score, self_value, score, value, neighbor_index, image_index)
    output_bytes = len(image_index) * workload.dim * dtype.itemsize
    return [
        Case(
            "pool_neighbors",
            inputs,
            launch_pool_neighbors,
            pool_neighbors_cpu,
            pool_neighbors_plain,
            in_float32(pool_neighbors_plain),
            num_bytes(*inputs) + output_bytes,
            rounding(dtype),
        )
    ]
