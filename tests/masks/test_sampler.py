"""The mask sampler: shapes, meaning of the indices, purity, independence of the number of shards."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtjepa.config import MaskSettings, parse_config
from dmtjepa.masks import MaskSampler
from dmtjepa.reference.masks import index_targets_reference
from tests.helpers.masks import CROWDED, SAMPLERS, block_size, same, sample_masks, tensors


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid_size", [(14, 14), (16, 16), (9, 14), (14, 9)])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_shapes_and_meaning(sampler, grid_size, batch_size):
    num_patches = math.prod(grid_size)
    for step in range(20):
        masks = sample_masks(MaskSettings(sampler=sampler), grid_size, batch_size, seed=1, step=step, shard=0)
        assert all(tensor.dtype == torch.int64 for tensor in tensors(masks))
        assert all(tensor.is_contiguous() for tensor in tensors(masks))
        num_context, (num_targets, size) = masks.context_index.shape[1], masks.target_index.shape[1:]
        assert masks.context_index.shape == (batch_size, num_context)
        assert num_context > 10
        assert masks.target_index.shape == masks.target_slot.shape == (batch_size, 4, size)
        assert num_targets == 4
        assert (masks.context_index.diff(dim=1) > 0).all()
        assert (masks.target_index.diff(dim=2) > 0).all()
        for name in ("target_unique", "neighborhood"):
            assert (getattr(masks, name).diff() > 0).all()
            assert getattr(masks, name).max() < batch_size * num_patches
        flat = masks.target_index + num_patches * torch.arange(batch_size)[:, None, None]
        assert torch.equal(masks.target_unique[masks.target_slot], flat)
        # Each block is a rectangle of the same size.
        height, width = block_size(masks, grid_size[1])
        corner = masks.target_index[:, :, :1]
        offset = torch.arange(height)[:, None] * grid_size[1] + torch.arange(width)
        assert torch.equal(masks.target_index, corner + offset.flatten())
        assert (corner % grid_size[1] + width <= grid_size[1]).all()
        # No image sees what it predicts.
        context = masks.context_index + num_patches * torch.arange(batch_size)[:, None]
        assert not torch.isin(context, masks.target_unique).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pure_function_of_seed_step_and_shard(sampler):
    mask = MaskSettings(sampler=sampler)
    first = sample_masks(mask, (14, 14), 4, seed=3, step=5, shard=2)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    sample_masks(mask, (14, 14), 4, seed=9, step=9, shard=9)
    assert same(first, sample_masks(mask, (14, 14), 4, seed=3, step=5, shard=2))
    for other in ({"seed": 4}, {"step": 6}, {"shard": 3}):
        assert not same(first, sample_masks(mask, (14, 14), 4, **{"seed": 3, "step": 5, "shard": 2, **other}))


def test_masks_of_a_step_never_change():
    """A resumed run must find the masks of the run it continues, also under a later version of this code or NumPy."""
    released = sample_masks(MaskSettings(), (14, 14), 2, seed=7, step=100, shard=1)
    assert released.target_index[:, :, 0].tolist() == [[59, 88, 29, 5], [113, 20, 33, 72]]
    assert released.context_index.shape == (2, 84)
    corrected = sample_masks(MaskSettings(sampler="corrected"), (14, 14), 2, seed=7, step=100, shard=1)
    assert corrected.target_index[:, :, 0].tolist() == [[60, 89, 29, 7], [113, 22, 35, 73]]
    assert corrected.context_index[:, :8].tolist() == [[0, 1, 2, 3, 4, 5, 6, 12], [0, 1, 2, 3, 5, 7, 8, 9]]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid_size", [(14, 14), (8, 9)])
def test_global_cut_does_not_depend_on_the_number_of_shards(sampler, grid_size):
    mask = MaskSettings(sampler=sampler, context_cut="global", **(CROWDED if grid_size == (8, 9) else {}))
    for step in range(10):
        whole = sample_masks(mask, grid_size, 12, seed=0, step=step, shard=0, num_shards=1)
        for num_shards in (2, 3, 12):
            batch_size = 12 // num_shards
            shards = [sample_masks(mask, grid_size, batch_size, 0, step, n, num_shards) for n in range(num_shards)]
            for name in ("context_index", "target_index"):
                assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(whole, name))
            for name in ("target_unique", "neighborhood"):
                shift = batch_size * math.prod(grid_size)
                flat = torch.cat([getattr(shard, name) + n * shift for n, shard in enumerate(shards)])
                assert torch.equal(flat, getattr(whole, name))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rank_cut_differs_from_the_global_cut_in_the_context_only(sampler):
    lengths = []
    for step, shard in itertools.product(range(5), range(4)):
        cut = {
            name: sample_masks(MaskSettings(sampler=sampler, context_cut=name), (14, 14), 8, 0, step, shard, 4)
            for name in ("rank", "global")
        }
        assert torch.equal(cut["rank"].target_index, cut["global"].target_index)
        lengths.append(tuple(masks.context_index.shape[1] for masks in cut.values()))
    assert all(by_rank >= by_world for by_rank, by_world in lengths)
    for step in range(5):
        by_rank, by_world = zip(*lengths[4 * step : 4 * step + 4], strict=True)
        assert len(set(by_world)) == 1
        assert min(by_rank) == by_world[0]
    assert any(by_rank > by_world for by_rank, by_world in lengths)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="window: 4"):
        sample_masks(MaskSettings(), (14, 14), 2, 0, 0, 0, window=4)
    with pytest.raises(ValueError, match="border: 'mirror'"):
        sample_masks(MaskSettings(), (14, 14), 2, 0, 0, 0, border="mirror")
    for shard in (-1, 2):
        with pytest.raises(ValueError, match=f"shard: {shard} is not in the range of 2 shards"):
            MaskSampler(MaskSettings(), (14, 14), 2).sample(0, shard, num_shards=2)


def test_the_sampler_of_a_configuration():
    values = {
        "data": {"crop_size": 72, "batch_size": 3},
        "mask": {"patch_size": 8, "min_keep": 2},
        "patch": {"patch_k_size": 5, "border": "clip"},
        "runtime": {"seed": 7},
    }
    config = parse_config(values)
    expected = MaskSampler(config.mask, (9, 9), 3, seed=7, window=5, border="clip")
    assert MaskSampler.from_config(config) == expected
    assert MaskSampler.from_config(config, batch_size=2, seed=0) == replace(expected, batch_size=2, seed=0)
    masks = expected.sample(step=4)
    assert (masks.window, masks.border) == (5, "clip")
    assert same(masks, sample_masks(config.mask, (9, 9), 3, 7, 4, 0, window=5, border="clip"))


def test_to_moves_every_tensor():
    masks = sample_masks(MaskSettings(), (14, 14), 2, 0, 0, 0).to("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors(masks))


@pytest.mark.gpu
def test_pinned_masks_reach_the_gpu_unchanged():
    masks = sample_masks(MaskSettings(), (14, 14), 2, 0, 0, 0)
    pinned = masks.pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors(pinned))
    moved = pinned.to("cuda")
    torch.cuda.synchronize()
    assert same(moved.to("cpu", non_blocking=False), masks)


def test_released_contexts_keep_their_first_patches():
    masks = sample_masks(MaskSettings(), (14, 14), 64, 0, 0, 0)
    block = [row * 14 + col for row in range(13) for col in range(13)]
    num_context = masks.context_index.shape[1]
    for context, targets in zip(masks.context_index.tolist(), masks.target_index.flatten(1).tolist(), strict=True):
        assert context == [n for n in block if n not in set(targets)][:num_context]


@pytest.mark.parametrize("border", ["wrap", "clip"])
@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize("grid_size", [(14, 14), (9, 14), (14, 9), (6, 6)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_indices_against_plain_loops(border, window, grid_size, sampler):
    mask = MaskSettings(sampler=sampler, min_keep=2)
    for step in range(5):
        masks = sample_masks(mask, grid_size, 3, 0, step, 0, window=window, border=border)
        unique, slot, neighborhood = index_targets_reference(masks.target_index.tolist(), grid_size, window, border)
        assert masks.target_unique.tolist() == unique
        assert masks.target_slot.tolist() == slot
        assert masks.neighborhood.tolist() == neighborhood
