"""Check that every step of a run has valid masks."""

from __future__ import annotations

import math

from dmtjepa.config import MaskSettings
from dmtjepa.masks.geometry import reachable_sizes, usable_grid
from dmtjepa.masks.placement import MAX_ATTEMPTS, REMEDY, MaskError, place_blocks


def check_masks(settings: MaskSettings, grid_size: tuple[int, int]) -> None:
    """Check that valid masks exist at every step.

    Every block size that can be drawn must have more than min_keep patches. Otherwise the official code loops forever.
    Every pair of a target and a context block size must have a placement in which the context, without the targets,
    keeps more than min_keep patches. Otherwise the official code always puts targets into the context. For the
    corrected sampler, such placements must not be too rare, either.

    Raises:
        MaskError: a size or a pair of sizes has no valid mask. The message says which, and what to change.
    """
    rows, cols = grid_size
    keep = settings.min_keep
    sizes = {
        "target": reachable_sizes(settings.pred_mask_scale, settings.aspect_ratio, grid_size, settings.sampler),
        "context": reachable_sizes(settings.enc_mask_scale, (1.0, 1.0), grid_size, settings.sampler),
    }
    for kind, key in (("target", "pred_mask_scale"), ("context", "enc_mask_scale")):
        height, width = min(sizes[kind], key=math.prod)
        area = height * width
        if area <= keep:
            lower = f"lower mask.min_keep below {area}, " if area else ""
            raise MaskError(
                f"mask: on a grid of {rows}x{cols} patches a {kind} block can be {height}x{width}, {area} patches, and "
                f"it must have more than min_keep {keep}; {lower}raise mask.{key} or take smaller patches"
            )
    if settings.allow_overlap:
        return

    def longest(target: tuple[int, int], context: tuple[int, int]) -> int:
        # Targets take the fewest patches from the context if all coincide, as far from it as the grid allows.
        overlap = 1
        for side, a, b in zip(usable_grid(grid_size, settings.sampler), target, context, strict=True):
            overlap *= max(0, a + b - side)
        return math.prod(context) - overlap

    target, context = min(((t, c) for t in sizes["target"] for c in sizes["context"]), key=lambda pair: longest(*pair))
    if longest(target, context) <= keep:
        raise MaskError(
            f"mask: on a grid of {rows}x{cols} patches a context block of {context[0]}x{context[1]} never keeps more "
            f"than {longest(target, context)} patches beside target blocks of {target[0]}x{target[1]}, and must keep "
            f"more than min_keep {keep}; {REMEDY}"
        )
    if settings.sampler == "corrected":
        # If valid placements exist but are rare, a run would stop at some step. If each of these 1024 images finds one
        # within 100 attempts, about one attempt in 20 succeeds or more, so that 1000 attempts will not all fail.
        crowded = [max(sizes["target"], key=math.prod)] * settings.num_pred_masks
        smallest = min(sizes["context"], key=math.prod)
        place_blocks(settings, grid_size, [*crowded, smallest], 0, 0, 0, 1024, MAX_ATTEMPTS // 10)
