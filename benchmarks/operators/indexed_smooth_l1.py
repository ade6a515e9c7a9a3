"""indexed_smooth_l1 at the shapes of training, forward and backward.

Unique bytes: predictions, unique targets, slots; backward also the gradient of the predictions.
"""

import torch

from benchmarks.operators.cases import Case, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.indexed_smooth_l1 import (
    indexed_smooth_l1_backward_cpu,
    indexed_smooth_l1_cpu,
    indexed_smooth_l1_plain,
    launch_indexed_smooth_l1,
    launch_indexed_smooth_l1_backward,
)


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    masks = workload.masks(0, device=device)
    slot = masks.target_slot
    prediction = torch.randn(*slot.shape, workload.dim, device=device).to(dtype)
    target = torch.randn(len(masks.target_unique), workload.dim, device=device).to(dtype)
    grad = torch.ones((), device=device)

    def plain_backward(grad, prediction, target, slot):
        distance = prediction.float() - target.index_select(0, slot.flatten()).view(prediction.shape).float()
        return (distance.clamp(-1, 1) * (grad / prediction.numel())).to(prediction.dtype)

    return [
        Case(
            "indexed_smooth_l1",
            (prediction, target, slot),
            launch_indexed_smooth_l1,
            indexed_smooth_l1_cpu,
            indexed_smooth_l1_plain,
            lambda prediction, target, slot: indexed_smooth_l1_plain(prediction.double(), target.double(), slot),
            num_bytes(prediction, target, slot),
            1e-5,
        ),
        Case(
            "indexed_smooth_l1 backward",
            (grad, prediction, target, slot),
            launch_indexed_smooth_l1_backward,
            indexed_smooth_l1_backward_cpu,
            plain_backward,
            lambda grad, prediction, target, slot: plain_backward(grad, prediction.float(), target, slot),
            num_bytes(prediction, target, slot, prediction),
            rounding(dtype),
        ),
    ]
