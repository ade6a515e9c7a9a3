"""What the targets of a training step show: sums made on the device, which add over ranks, and figures made of them.

The figures are those of docs/training_figures.md. Nothing here makes the host wait for the device but
`read_targets` and `describe_features`, which take what the host has fetched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmtjepa.evaluation.collapse import collapse_numbers

NUM_PAIR_SUMS, NUM_ERROR_SUMS = 6, 4
"""Lengths of the results of `sum_targets` and `sum_errors`: that of `sum_errors` has D more, and ends both."""


@torch.no_grad()
def sum_targets(
    predictions: Tensor, targets: Tensor, target_unique: Tensor, target_slot: Tensor, num_patches: int
) -> Tensor:
    """The sums of a batch that `read_targets` needs. Those of several batches or ranks can be added.

    Args:
        predictions: [B, M, T, D] of the student, any floating dtype.
        targets: [U, D] of the teacher, any floating dtype.
        target_unique: [U] int64, flat numbers b*N + n of the target patches.
        target_slot: [B, M, T] int64, the row of `targets` for each prediction.
        num_patches: N, patches of an image.

    Returns:
        [10 + D] float32, on the device of `targets`.
    """
    y, mean, uses = _center(targets, target_slot)
    square = y.square().sum(1)
    sums = [
        y.new_full((), float(len(y) * (len(y) - 1))),
        2 * (len(y) * square.sum() - y.sum(0).square().sum()),
        *_sum_pairs(y, square, target_unique // num_patches, len(target_slot)),
        *_sum_pairs(y, square, target_unique % num_patches, num_patches),
    ]
    return torch.cat([torch.stack(sums), _sum_errors(predictions, target_slot, y, mean, uses @ square)])


@torch.no_grad()
def sum_errors(predictions: Tensor, targets: Tensor, slot: Tensor) -> Tensor:
    """The sums of a batch that `explained_variance` needs. Those of several batches or ranks can be added.

    Args:
        predictions: [B, M, T, D] of the student, any floating dtype.
        targets: [U, D] of the teacher, any floating dtype.
        slot: [B, M, T] int64, the row of `targets` for each prediction.

    Returns:
        [4 + D] float32, on the device of `targets`.
    """
    y, mean, uses = _center(targets, slot)
    return _sum_errors(predictions, slot, y, mean, uses @ y.square().sum(1))


def _center(targets: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [U, D] without their mean, which is taken over all predictions; this mean; how often each is predicted.

    Sums of squares of numbers around 1 would hide a variance of 1e-6.
    """
    y = targets.float()
    uses = y.new_zeros(len(y)).index_add_(0, slot.flatten(), y.new_ones(slot.numel()))
    mean = uses @ y / slot.numel()
    return y - mean, mean, uses


def _sum_errors(predictions: Tensor, slot: Tensor, y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """`sum_errors` of targets without their mean, and the sum of their squares over all predictions."""
    error = y.new_zeros(())
    for block in range(slot.shape[1]):  # one by one: all targets together would need the memory of all predictions
        difference = predictions[:, block].float() - mean - y[slot[:, block]]
        error = error + difference.square().sum()
    sums = [y.new_full((), slot.numel()), error, spread, slot.numel() * mean.square().sum()]
    return torch.cat([torch.stack(sums), slot.numel() * mean])


def _sum_pairs(y: Tensor, square: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Number of ordered pairs of two rows [U, D] of the same group, and the sum of their squared distances."""
    count = y.new_zeros(num_groups).index_add_(0, group, torch.ones_like(square))
    squares = y.new_zeros(num_groups).index_add_(0, group, square)
    total = y.new_zeros(num_groups, y.shape[1]).index_add_(0, group, y)
    return (count * (count - 1)).sum(), 2 * (count * squares - total.square().sum(1)).sum()


def read_targets(sums: Sequence[float]) -> dict[str, float]:
    """Explained variance of the targets, and how their variance divides.

    `explained_variance` is that of the function of this name. `variance` is that of a dimension, averaged over
    dimensions. It divides into the part that all patches of an image share (`variance_between_images`), the part that
    all patches at a position of the grid share (`variance_of_position`), and the rest (`variance_within_images`); the
    three shares sum to 1. They are estimated from pairs of patches, each patch once: half the mean squared distance of
    two patches is the whole variance if image and position differ, and lacks the share of the image, or of the
    position, where they agree. So the estimate is unbiased for batches of any size and masks of any shape, and a share
    near 0 can come out slightly negative.

    Args:
        sums: [10 + D] of `sum_targets`, added over batches and ranks.

    Returns:
        Figures by name; NaN where the batch does not determine them.
    """
    all_pairs, all_distance, *by_group = (float(x) for x in sums[:NUM_PAIR_SUMS])
    image_pairs, image_distance, position_pairs, position_distance = by_group
    errors = sums[NUM_PAIR_SUMS:]
    pairs = all_pairs - image_pairs - position_pairs
    variance = _divide(all_distance - image_distance - position_distance, 2 * pairs)
    between = 1 - _divide(_divide(image_distance, 2 * image_pairs), variance)
    position = 1 - _divide(_divide(position_distance, 2 * position_pairs), variance)
    return {
        "explained_variance": explained_variance(errors),
        "variance": variance / (len(errors) - NUM_ERROR_SUMS),
        "variance_between_images": between,
        "variance_of_position": position,
        "variance_within_images": 1 - between - position,
    }


def explained_variance(sums: Sequence[float]) -> float:
    """1 - squared error / variance, over all predictions and dimensions.

    The squared error is |prediction - target|^2 whatever the loss, the variance that of the targets around the mean of
    each dimension. 1 is a perfect prediction, 0 what the mean of the targets would reach. A target counts as often as
    it is predicted.

    Args:
        sums: [4 + D] of `sum_errors`, added over batches and ranks.

    Returns:
        NaN for targets that are all equal.
    """
    count, error, spread, mean_square = (float(x) for x in sums[:NUM_ERROR_SUMS])
    mean_sum = np.asarray(sums[NUM_ERROR_SUMS:], dtype=np.float64)
    total = spread + max(0.0, mean_square - _divide(float(mean_sum @ mean_sum), count))
    return 1 - _divide(error, total)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


@torch.no_grad()
def count_changed(before: Tensor, now: Tensor) -> Tensor:
    """Count chosen neighbours that were not chosen before; their order does not count.

    Args:
        before, now: [U, K] int64 of `select_neighbors`, -1 for missing neighbours.

    Returns:
        [2] float32: neighbours in `now` that are not in `before`, and all neighbours in `now`.
    """
    chosen = now >= 0
    kept = (now[:, :, None] == before[:, None, :]).any(2) & chosen
    total = chosen.sum()
    return torch.stack([total - kept.sum(), total]).float()


def describe_features(features: Tensor) -> dict[str, float]:
    """Effective rank (RankMe), centred effective rank, and mean cosine of features [n, D] on the host.

    See `dmtjepa.evaluation.collapse`. NaN if there are fewer than two features, or one is not finite.
    """
    names = ("effective_rank", "effective_rank_centered", "mean_cosine")
    if len(features) < 2 or not features.isfinite().all():
        return dict.fromkeys(names, math.nan)
    numbers = collapse_numbers(features)
    return {name: getattr(numbers, name) for name in names}
