"""The smallest and the largest masks that the sampler of a workload can draw, for programs on fake GPUs."""

import itertools
import math

import torch

from benchmarks.workloads import Workload
from dmtjepa.masks import MaskBatch
from dmtjepa.masks.geometry import reachable_sizes, usable_grid


def context_bounds(workload: Workload) -> tuple[int, int]:
    """Least and most patches of a context, C."""
    mask, grid = workload.config().mask, workload.grid_size
    targets = reachable_sizes(mask.pred_mask_scale, mask.aspect_ratio, grid, mask.sampler)
    contexts = reachable_sizes(mask.enc_mask_scale, (1.0, 1.0), grid, mask.sampler)
    fewest, most = set(), set()
    for target, context in itertools.product(targets, contexts):
        # Targets take most patches from the context where they lie apart, and fewest where all coincide, as far from
        # it as the grid allows.
        overlaps = zip(usable_grid(grid, mask.sampler), target, context, strict=True)
        overlap = math.prod(max(0, a + b - side) for side, a, b in overlaps)
        fewest.add(max(mask.min_keep + 1, math.prod(context) - mask.num_pred_masks * math.prod(target)))
        most.add(math.prod(context) - overlap)
    return min(fewest), max(most)


def extreme_masks(workload: Workload, device: torch.device) -> list[MaskBatch]:
    """Every combination of the shortest or longest contexts with the smallest or largest and most scattered targets.

    They have the shapes of masks alone: where nothing is computed, their patches do not matter.
    """
    mask, batch = workload.config().mask, workload.batch_size
    sizes = reachable_sizes(mask.pred_mask_scale, mask.aspect_ratio, workload.grid_size, mask.sampler)
    areas = sorted(map(math.prod, sizes))
    scattered = min(mask.num_pred_masks * areas[-1], workload.num_patches)
    # T, U and R of an image
    targets = [(areas[0], areas[0], areas[0]), (areas[-1], scattered, workload.num_patches)]

    def make(context: int, target: int, unique: int, neighborhood: int) -> MaskBatch:
        block = torch.arange(target).repeat(batch, mask.num_pred_masks, 1)
        return MaskBatch(
            context_index=torch.arange(context).repeat(batch, 1),
            target_index=block,
            target_unique=torch.arange(batch * unique),
            target_slot=block,
            neighborhood=torch.arange(batch * neighborhood),
            window=workload.config().patch.patch_k_size,
            border=workload.config().patch.border,
        ).to(device)

    return [make(context, *target) for context in context_bounds(workload) for target in targets]
