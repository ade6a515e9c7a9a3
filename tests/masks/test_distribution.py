"""The distribution of masks: that of the official code, and of the slow sampler in `dmtjepa.reference`."""

import math
import random

import numpy as np
import pytest

from dmtjepa.config import MaskSettings
from dmtjepa.reference.masks import sample_masks_reference
from tests.helpers.masks import CROWDED, RARE, SAMPLERS, block_size, sample_masks

# Means over 300 batches of the official code on two grids.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid_size", "batch_size", "context", "target", "unique", "neighborhood"),
    [((16, 16), 128, 68.3, 44.2, 115, 168), ((14, 14), 256, 48.5, 33.2, 87, 133)],
)
def test_released_statistics(grid_size, batch_size, context, target, unique, neighborhood):
    batches = [sample_masks(MaskSettings(), grid_size, batch_size, 0, step, 0) for step in range(600)]
    lengths = [masks.context_index.shape[1] for masks in batches]
    # Standard deviation of a batch's shortest context: 11.
    assert np.mean(lengths) == pytest.approx(context, abs=1.5)
    assert np.mean([masks.target_index.shape[2] for masks in batches]) == pytest.approx(target, abs=0.5)
    assert np.mean([len(masks.target_unique) for masks in batches]) / batch_size == pytest.approx(unique, abs=1)
    assert np.mean([len(masks.neighborhood) for masks in batches]) / batch_size == pytest.approx(neighborhood, abs=1)
    if grid_size == (16, 16):
        assert 30 <= min(lengths) <= 48
        assert 90 <= max(lengths) <= 108


def same_distribution(first, second) -> float:
    """p-value of the hypothesis that two lists of (hashable) observations come from one distribution."""
    from scipy import stats

    values = sorted({*first, *second})
    table = np.array([[sample.count(value) for value in values] for sample in (first, second)])
    frequent = table.sum(0) >= 20
    table = np.column_stack([table[:, frequent], table[:, ~frequent].sum(1)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("grid_size", "options"),
    [((14, 14), {}), ((9, 14), {}), ((8, 8), CROWDED), pytest.param((14, 14), RARE, marks=pytest.mark.slow)],
)
def test_same_distribution_as_the_plain_sampler(sampler, grid_size, options):
    """Sizes of blocks, corners of the first and last target, patches of the context: those seen, and those leaked."""
    mask = MaskSettings(sampler=sampler, **options)
    rng = random.Random(0)

    def observe(contexts, targets):
        seen = {n for block in targets[0] for n in block}
        leaked = sum(n in seen for n in contexts[0])
        return len(targets[0][0]), targets[0][0][0], targets[0][-1][0], len(contexts[0]), leaked, contexts[0][0]

    plain = [observe(*sample_masks_reference(mask, grid_size, 1, rng)[:2]) for _ in range(1000)]
    fast = []
    for step in range(1000):
        masks = sample_masks(mask, grid_size, 1, 0, step, 0)
        fast.append(observe(masks.context_index.tolist(), masks.target_index.tolist()))
    for name, first, second in zip(
        ("size", "first corner", "last corner", "context", "leaked", "context patch"),
        map(list, zip(*plain, strict=True)),
        map(list, zip(*fast, strict=True)),
        strict=True,
    ):
        if name == "leaked" and (sampler == "corrected" or not options):
            assert not any(first + second)
            continue
        assert same_distribution(first, second) > 1e-3, name
    if sampler == "released" and options:
        assert any(row[4] for row in fast)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "num_batches"), [("released", 60), ("corrected", 60)])
def test_same_context_lengths_as_the_plain_sampler(sampler, num_batches):
    from scipy import stats

    mask = MaskSettings(sampler=sampler)
    rng = random.Random(1)
    plain = [len(sample_masks_reference(mask, (16, 16), 64, rng)[0][0]) for _ in range(num_batches)]
    fast = [sample_masks(mask, (16, 16), 64, 0, step, 0).context_index.shape[1] for step in range(400)]
    assert stats.ks_2samp(plain, fast).pvalue > 1e-2


def corners(sampler: str, grid_size: tuple[int, int], num_steps: int) -> dict[tuple[int, int], np.ndarray]:
    """Upper left patches of the target blocks, by block size, over many images."""
    found = {}
    for step in range(num_steps):
        masks = sample_masks(MaskSettings(sampler=sampler), grid_size, 256, 0, step, 0)
        found.setdefault(block_size(masks, grid_size[1]), []).append(masks.target_index[:, :, 0].flatten().numpy())
    return {size: np.concatenate(parts) for size, parts in found.items()}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid_size", [(14, 14), (9, 14)])
def test_positions_are_uniform(sampler, grid_size):
    from scipy import stats

    usable = 1 if sampler == "corrected" else 0
    for (height, width), corner in corners(sampler, grid_size, 40).items():
        count = np.bincount(corner, minlength=math.prod(grid_size)).reshape(grid_size)
        num_tops, num_lefts = grid_size[0] - height + usable, grid_size[1] - width + usable
        assert count.sum() == count[:num_tops, :num_lefts].sum()
        assert stats.chisquare(count[:num_tops, :num_lefts].ravel()).pvalue > 1e-4


@pytest.mark.parametrize("grid_size", [(14, 14), (9, 14)])
def test_released_never_draws_the_last_row_or_column_and_corrected_does(grid_size):
    for sampler in SAMPLERS:
        target, context = np.zeros((2, math.prod(grid_size)), bool)
        for step in range(60):
            masks = sample_masks(MaskSettings(sampler=sampler), grid_size, 64, 0, step, 0)
            target[masks.target_index.flatten()] = True
            context[masks.context_index.flatten()] = True
        for seen in (target.reshape(grid_size), context.reshape(grid_size)):
            assert seen[:-1, :-1].all() or sampler == "released"
            assert seen[-1].any() == seen[:, -1].any() == (sampler == "corrected")
            assert seen.all() == (sampler == "corrected")


def test_corrected_contexts_keep_a_uniformly_random_subset():
    from scipy import stats

    # The context block is the grid, so that the context before the cut is all that the targets leave.
    mask = MaskSettings(sampler="corrected", enc_mask_scale=(1.0, 1.0))
    dropped, expected = np.zeros((2, 10))
    for step in range(20):
        masks = sample_masks(mask, (14, 14), 64, 0, step, 0)
        num_context = masks.context_index.shape[1]
        for context, targets in zip(masks.context_index.numpy(), masks.target_index.flatten(1).numpy(), strict=True):
            free = np.setdiff1d(np.arange(196), targets)
            kept = np.isin(free, context)
            assert kept.sum() == num_context
            tenth = np.arange(len(free)) * 10 // len(free)
            dropped += np.bincount(tenth[~kept], minlength=10)
            expected += np.bincount(tenth, minlength=10) * (1 - num_context / len(free))
    assert stats.chisquare(dropped, expected).pvalue > 1e-3
