"""Samplers, settings and comparisons of masks for tests."""

from dataclasses import fields

import torch
from hypothesis import strategies as st

from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskBatch, MaskError, MaskSampler, check_masks

SAMPLERS = ("released", "corrected")
# Crowded: contexts are often too short, so blocks are drawn again and (released) targets given up.
CROWDED = {"pred_mask_scale": (0.3, 0.4), "enc_mask_scale": (0.4, 0.6), "min_keep": 4}
# Contexts of 4x4 in the gaps between large targets: many attempts fail, and how many are made shows.
RARE = {"pred_mask_scale": (0.3, 0.4), "enc_mask_scale": (0.1, 0.1), "min_keep": 10}


def sample_masks(settings, grid_size, batch_size, seed, step, shard, num_shards=None, **window) -> MaskBatch:
    sampler = MaskSampler(settings, grid_size, batch_size, seed, **window)
    return sampler.sample(step, shard, num_shards or shard + 1)


def tensors(masks: MaskBatch) -> list[torch.Tensor]:
    values = [getattr(masks, field.name) for field in fields(masks)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def same(first: MaskBatch, second: MaskBatch) -> bool:
    return all(map(torch.equal, tensors(first), tensors(second)))


def block_size(masks: MaskBatch, cols: int) -> tuple[int, int]:
    block = masks.target_index[0, 0]
    width = int((block // cols == block[0] // cols).sum())
    return len(block) // width, width


fractions = st.floats(0.02, 1.0)
ranges = st.tuples(fractions, fractions).map(lambda pair: (min(pair), max(pair)))
mask_settings = st.builds(
    MaskSettings,
    allow_overlap=st.booleans(),
    aspect_ratio=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(lambda pair: (min(pair), max(pair))),
    enc_mask_scale=ranges,
    pred_mask_scale=ranges,
    min_keep=st.integers(0, 12),
    num_pred_masks=st.integers(1, 9),
    sampler=st.sampled_from(SAMPLERS),
    context_cut=st.sampled_from(["rank", "global"]),
)


def accepted(mask: MaskSettings, grid_size: tuple[int, int]) -> bool:
    try:
        check_masks(mask, grid_size)
    except MaskError:
        return False
    return True
