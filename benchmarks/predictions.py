"""Predicted times on one GPU, from FLOPs and bytes. docs/performance.md compares them with what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.workloads import Workload
from dmtjepa.models.vit import ARCHITECTURES
from dmtjepa.training.estimate import count_parameters


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step of a workload (see benchmarks/workloads.py), by GPU.

    `seconds` is a ceiling: products and unique bytes at the rates that libraries reach. `with_kernels` also counts what
    the kernels of Inductor read and write.
    """

    workload: str
    seconds: dict[str, float]
    with_kernels: dict[str, float]


PREDICTIONS = {
    "ViT-B/16": Prediction("vit_base:256", {"A100": 0.129, "H100": 0.056}, {"H100": 0.064}),
    "ViT-L/16": Prediction("vit_large:256", {"A100": 0.360, "H100": 0.153}, {"H100": 0.176}),
    "ViT-H/14": Prediction("vit_huge:128", {"A100": 0.436, "H100": 0.182}, {"H100": 0.212}),
}

# Microseconds of an operator at ViT-H/14, 128 images, bfloat16, on an H100.
OPERATORS_HUGE = {
    "gather_tokens": 23,
    "gather_tokens backward": 42,
    "embed_patches all": 24,
    "embed_patches context": 9,
    "select_neighbors": 24,
    "aggregate_neighbors": 103,
    "pool_neighbors": 37,
    "indexed_smooth_l1": 29,
    "indexed_smooth_l1 backward": 46,
}


def update_bytes(workload: Workload, *, fused: bool, copy_size: int = 2) -> int:
    """Bytes that a GPU reads and writes to update student and teacher and to make copies for the next step.

    Args:
        fused: in one pass (`runtime.fused_update`) instead of AdamW, the moving average and the copies in turn. The
            norm of the gradient is not counted, nor is clipping.
        copy_size: bytes of a number of the computation.
    """
    adamw = 4 * (4 + 3)  # reads the weight, its gradient and two averages; writes all but the gradient
    average = 4 * (2 + 1)
    copied = 4 + copy_size
    parameters = count_parameters(workload.config())
    averaged = sum(count for name, count in parameters.items() if name.startswith("teacher"))
    student = sum(parameters.values()) - averaged
    if fused:
        return student * (adamw + copy_size) + averaged * (4 * 2 + copy_size)
    return student * (adamw + copied) + averaged * (average + copied)


def bias_gradient_bytes(workload: Workload, step: int) -> int:
    """Bytes that a GPU reads again in the backward pass of a step for the gradients of biases, in bfloat16.

    Three kernels of Inductor in each block sum gradients that another kernel has written: that of fc1's output (4 D
    numbers a patch), of queries, keys and values (3 D), and of one more linear layer (D). The others are summed where
    they are computed. The last block of the predictor is counted as if it computed all tokens.
    """
    config, shapes = workload.config(), workload.mask_shapes(step)
    num_blocks = workload.masks(step).target_index.shape[1]
    encoder = int(ARCHITECTURES[workload.model]["depth"]) * workload.dim * shapes.context
    tokens = num_blocks * (shapes.context + shapes.target)
    predictor = config.meta.pred_depth * config.meta.pred_emb_dim * tokens
    return int(2 * (4 + 3 + 1) * workload.batch_size * (encoder + predictor))
