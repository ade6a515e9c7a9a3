"""Reachable block sizes, and settings without valid masks: accepted settings give masks, others are refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskError, check_masks
from dmtjepa.masks.geometry import reachable_sizes
from dmtjepa.reference.masks import index_targets_reference
from tests.helpers.masks import SAMPLERS, accepted, block_size, mask_settings, sample_masks


@pytest.mark.slow
def test_released_draws_five_sizes_and_corrected_eleven():
    for sampler, num_sizes in (("released", 5), ("corrected", 11)):
        sizes = {
            block_size(sample_masks(MaskSettings(sampler=sampler), (14, 14), 1, 0, step, 0), 14) for step in range(1000)
        }
        assert len(sizes) == num_sizes
        assert sizes == reachable_sizes((0.15, 0.2), (0.75, 1.5), (14, 14), sampler)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    mask=mask_settings,
    grid_size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10**7),
    window=st.sampled_from([1, 3, 5, 7]),
    border=st.sampled_from(["wrap", "clip"]),
)
def test_any_accepted_settings_give_valid_masks(mask, grid_size, batch_size, seed, step, window, border):
    assume(accepted(mask, grid_size))
    masks = sample_masks(mask, grid_size, batch_size, seed, step, 1, 2, window=window, border=border)
    assert masks.context_index.shape[0] == batch_size
    assert masks.context_index.shape[1] > mask.min_keep
    assert masks.target_index.shape[:2] == (batch_size, mask.num_pred_masks)
    assert masks.target_index.shape[2] > mask.min_keep
    for index in (masks.context_index, masks.target_index):
        assert (index.diff(dim=-1) > 0).all()
        assert index.min() >= 0
        assert index.max() < math.prod(grid_size)
        if mask.sampler == "released":
            assert (index // grid_size[1]).max() < grid_size[0] - 1
            assert (index % grid_size[1]).max() < grid_size[1] - 1
    unique, slot, neighborhood = index_targets_reference(masks.target_index.tolist(), grid_size, window, border)
    assert masks.target_unique.tolist() == unique
    assert masks.target_slot.tolist() == slot
    assert masks.neighborhood.tolist() == neighborhood
    if mask.sampler == "corrected" and not mask.allow_overlap:
        for context, targets in zip(masks.context_index, masks.target_index, strict=True):
            assert not torch.isin(context, targets).any()


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(mask=mask_settings, grid_size=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_reachable_sizes_are_all_sizes(mask, grid_size):
    """Against a fine scan of the official sampler's one random number, which may miss a narrow piece."""
    sizes = reachable_sizes(mask.pred_mask_scale, mask.aspect_ratio, grid_size, "released")
    scanned = set()
    for u in np.linspace(0, 1, 400, endpoint=False) + 1 / 797:
        area = int(math.prod(grid_size) * (mask.pred_mask_scale[0] + u * np.subtract(*mask.pred_mask_scale[::-1])))
        ratio = mask.aspect_ratio[0] + u * np.subtract(*mask.aspect_ratio[::-1])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        scanned.add((min(height, grid_size[0] - 1), min(width, grid_size[1] - 1)))
    assert scanned <= sizes
    assert len(sizes) <= len(scanned) + 3 * math.isqrt(math.prod(grid_size))


# Settings that have no valid mask.


def exists(mask: MaskSettings, grid_size: tuple[int, int]) -> bool:
    """Whether every pair of block sizes has a valid placement: tries all placements of all blocks."""
    rows, cols = grid_size if mask.sampler == "corrected" else (grid_size[0] - 1, grid_size[1] - 1)

    def placements(size):
        for top, left in itertools.product(range(rows - size[0] + 1), range(cols - size[1] + 1)):
            yield {(top + i, left + j) for i in range(size[0]) for j in range(size[1])}

    targets = reachable_sizes(mask.pred_mask_scale, mask.aspect_ratio, grid_size, mask.sampler)
    contexts = reachable_sizes(mask.enc_mask_scale, (1.0, 1.0), grid_size, mask.sampler)
    for target, context in itertools.product(targets, contexts):
        best = 0
        for blocks in itertools.product(placements(target), repeat=mask.num_pred_masks):
            free = [block.difference(*blocks) if not mask.allow_overlap else block for block in placements(context)]
            best = max([best, *map(len, free)])
        if min(math.prod(target), best) <= mask.min_keep:
            return False
    return True


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    mask=mask_settings.map(lambda mask: mask.model_copy(update={"num_pred_masks": min(2, mask.num_pred_masks)})),
    grid_size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    min_keep=st.integers(0, 4),
)
def test_refuses_what_has_no_valid_mask(mask, grid_size, min_keep):
    mask = mask.model_copy(update={"min_keep": min_keep})
    if mask.sampler == "released":
        assert accepted(mask, grid_size) == exists(mask, grid_size)
    elif accepted(mask, grid_size):
        assert exists(mask, grid_size)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_official_settings_on_official_grids_are_accepted(sampler):
    for grid_size in [(14, 14), (16, 16), (28, 28), (9, 14)]:
        check_masks(MaskSettings(sampler=sampler), grid_size)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_small_grid_is_refused_with_the_reason(sampler):
    """36 patches with the official settings, with which the official code loops forever."""
    mask = MaskSettings(sampler=sampler)
    with pytest.raises(
        MaskError, match=r"6x6 patches a target block can be 2x2, 4 patches.*lower mask.min_keep below 4"
    ):
        check_masks(mask, (6, 6))
    with pytest.raises(MaskError, match="at step 3 the target blocks are"):
        sample_masks(mask, (6, 6), 4, 0, 3, 0)
    check_masks(mask.model_copy(update={"min_keep": 3}), (6, 6))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_context_without_room_is_refused(sampler):
    crowded = MaskSettings(sampler=sampler, pred_mask_scale=(0.9, 1.0), aspect_ratio=(1.0, 1.0))
    with pytest.raises(MaskError, match="never keeps more than 0 patches"):
        check_masks(crowded, (14, 14))
    check_masks(crowded.model_copy(update={"allow_overlap": True}), (14, 14))


@pytest.mark.slow
def test_rare_valid_masks_are_refused_and_never_looped_for():
    mask = MaskSettings(sampler="corrected", num_pred_masks=32, pred_mask_scale=(0.3, 0.3), min_keep=45)
    with pytest.raises(MaskError, match=r"no placement in 100 attempts .* 32 target blocks"):
        check_masks(mask, (14, 14))
    with pytest.raises(MaskError, match=r"at step 8, image 1: no placement in 1000 attempts"):
        sample_masks(mask, (14, 14), 1, 0, 8, 1)
    # The official sampler accepts a context that overlaps targets.
    masks = sample_masks(mask.model_copy(update={"sampler": "released"}), (14, 14), 1, 0, 8, 1)
    assert torch.isin(masks.context_index, masks.target_index).any()
