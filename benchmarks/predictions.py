"""Predicted times on one GPU, from FLOPs and bytes. docs/performance.md compares them with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.workloads import Workload
from dmtjepa.models.vit import ARCHITECTURES
from dmtjepa.training.estimate import count_parameters, step_flops


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
    parameters = _count_parameters(workload)
    averaged = sum(count for name, count in parameters.items() if name.startswith("teacher"))
    student = sum(parameters.values()) - averaged
    if fused:
        return student * (adamw + copy_size) + averaged * (4 * 2 + copy_size)
    return student * (adamw + copied) + averaged * (average + copied)


@cache
def _count_parameters(workload: Workload) -> dict[str, int]:
    """Those of each module. It takes a second, and `gpu_check` makes its page after each step."""
    return count_parameters(workload.config())


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


# ---- A step by groups of kernels

# Rates that libraries reach on an H100: 85% of 800 TFLOP/s, 90% of 3.0 TB/s.
PRODUCT_RATE, BANDWIDTH = 0.85 * 800e12, 0.90 * 3.0e12

# Numbers per patch and channel of a block that kernels read and write, in the forward and the backward pass: as few as
# can be, with all that follows a product fused, and in the kernels that Inductor makes.
# Each norm reads the residual stream and what is added to it, and writes both sum and norm. Inductor's first norm reads
# what a kernel for the sum alone has written, and its backward kernels were counted in the profile of the H200.
NORM_NUMBERS = {"ceiling": (8, 8), "kernels": (9, 11)}
GELU_NUMBERS = (2, 3)  # of the width of the MLP


@dataclass
class Group:
    """Work of a step in kernels of one kind.

    Args:
        flops: of products and attention.
        bytes: at least; 0 where only FLOPs are counted.
        kernel_bytes: what the kernels of Inductor and the updates one after another read and write.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    kernel_bytes: float = 0.0

    def seconds(self, *, with_kernels: bool) -> float:
        """Predicted for an H100."""
        moved = self.kernel_bytes if with_kernels else self.bytes
        return max(self.flops / PRODUCT_RATE, moved / BANDWIDTH)


def kernel_groups(workload: Workload, steps: Sequence[int], size: int = 2) -> list[Group]:
    """The groups of a step, means of `steps`. Everything that the backward pass needs is kept.

    Args:
        size: bytes of a number of the computation.
    """
    found = [_groups_of_step(workload, step, size) for step in steps]

    def mean(same: Sequence[Group]) -> Group:
        values = ([getattr(group, key) for group in same] for key in ("flops", "bytes", "kernel_bytes"))
        return Group(same[0].name, *(sum(value) / len(same) for value in values))

    return [mean(same) for same in zip(*found, strict=True)]


def _groups_of_step(workload: Workload, step: int, size: int) -> list[Group]:
    config, shapes, batch = workload.config(), workload.mask_shapes(step), workload.batch_size
    architecture = ARCHITECTURES[workload.model]
    dim, depth, ratio = architecture["embed_dim"], architecture["depth"], architecture["mlp_ratio"]
    narrow, num_blocks = config.meta.pred_emb_dim, config.mask.num_pred_masks
    length = shapes.context + shapes.target
    # (whose, patches, patches of a sequence, width, MLP ratio, blocks, passes forward and backward)
    stacks = [
        ("teacher", batch * workload.num_patches, workload.num_patches, dim, ratio, depth, (1, 0)),
        ("student", batch * shapes.context, shapes.context, dim, ratio, depth, (1, 1)),
        # The last block computes everything but keys and values of the targets alone.
        ("student", batch * num_blocks * length, length, narrow, 4.0, config.meta.pred_depth - 1, (1, 1)),
        ("student", batch * num_blocks * shapes.target, length, narrow, 4.0, 1, (1, 1)),
    ]
    groups: dict[str, Group] = {}

    def add(name: str, flops: float = 0.0, moved: float = 0.0, by_kernels: float | None = None) -> None:
        group = groups.setdefault(name, Group(name))
        group.flops += flops
        group.bytes += moved
        group.kernel_bytes += moved if by_kernels is None else by_kernels

    for whose in ("teacher", "student"):
        for name in ("qkv", "proj", "fc1", "fc2"):
            add(f"{whose}: {name}")
    for whose, rows, keys, width, mlp, blocks, (forward, backward) in stacks:
        widths = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, mlp), "fc2": (mlp, 1)}
        for name, (into, out) in widths.items():
            passes = blocks * (forward + 2 * backward)
            matrix = into * out * width**2
            add(f"{whose}: {name}", passes * 2 * rows * matrix, passes * size * (rows * (into + out) * width + matrix))
        channels = blocks * rows * width  # of all blocks
        numbers = size * channels
        # The backward pass computes the scores again.
        add("attention", channels * keys * (4 * forward + 10 * backward), numbers * (4 * forward + 8 * backward))
        fused, by_kernels = (numbers * (a * forward + b * backward) for a, b in NORM_NUMBERS.values())
        add("LayerNorm and residual", 0.0, fused, by_kernels)
        add("GELU", 0.0, numbers * mlp * (GELU_NUMBERS[0] * forward + GELU_NUMBERS[1] * backward))
        # The gradients of queries, keys and values are copied into one tensor, and then those of biases are summed.
        add("qkv gradients", 0.0, 0.0, numbers * 6 * backward)
    add("bias gradients", 0.0, 0.0, bias_gradient_bytes(workload, step))
    # Keys and values of the contexts in the last block: 2 D^2 multiplications a patch, in three passes.
    add("student: qkv", 3 * 2 * 2 * batch * num_blocks * shapes.context * narrow**2)
    flops, pixels = step_flops(config, shapes), config.data.channels * config.mask.patch_size**2
    others = flops.get("target head", 0.0) + flops.get("context head", 0.0)
    others += 2 * pixels * dim * (workload.num_patches + 3 * shapes.context)
    others += 3 * 2 * dim * narrow * (shapes.context + num_blocks * shapes.target)
    add("heads and embeddings", batch * others)
    add("update", 0.0, update_bytes(workload, fused=True), update_bytes(workload, fused=False))
    return list(groups.values())
