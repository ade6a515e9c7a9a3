"""Signs of collapse: features that are nearly the same for all images, or that vary in few dimensions.

The numbers need no labels and are cheap to compute, for a batch of targets during training as for the features of a
data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_COSINE = 0.995
"""Features of one street had a mean cosine of 0.990 and segmented it better than untrained ones, of 0.977."""
MIN_RANK = 2.0
MIN_FEATURES = 10
"""n features differ in n - 1 directions at most: fewer features have a low rank whether they are collapsed or not."""


@dataclass(frozen=True)
class CollapseNumbers:
    """Numbers of n features of D dimensions.

    effective_rank: RankMe, from 1 (a single direction) to min(n, D).
    effective_rank_centered: the same after the mean feature is subtracted: directions in which features differ.
    feature_std, feature_std_min: standard deviation over features, its mean and minimum over dimensions.
    mean_cosine: mean cosine similarity of two different features; 1 if all features have the same direction.
    """

    num_features: int
    num_dimensions: int
    effective_rank: float
    effective_rank_centered: float
    feature_std: float
    feature_std_min: float
    mean_cosine: float

    @property
    def collapsed(self) -> bool:
        """Whether features are nearly the same: mean cosine above 0.995, or a centred effective rank below 2.

        The rank of fewer than 10 features does not count.
        """
        is_low = self.num_features >= MIN_FEATURES and self.effective_rank_centered < MIN_RANK
        return self.mean_cosine > MAX_COSINE or is_low


@torch.no_grad()
def collapse_numbers(features: Tensor) -> CollapseNumbers:
    """Collapse numbers of features [n,D], n at least 2, of any floating dtype and device; computed in float64.

    Raises:
        ValueError: there are fewer than two features, or values are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"collapse numbers need features [n,D] with n at least 2, not {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite")
    features = features.double()
    centered = features - features.mean(0)
    std = features.std(0)
    return CollapseNumbers(
        num_features=features.shape[0],
        num_dimensions=features.shape[1],
        effective_rank=effective_rank(features),
        effective_rank_centered=effective_rank(centered),
        feature_std=std.mean().item(),
        feature_std_min=std.min().item(),
        mean_cosine=mean_cosine(features),
    )


def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885, equation 1) of features [n,D].

    exp of the entropy of the singular values divided by their sum; n equal singular values give n. The singular values
    are computed from the smaller Gram matrix, in float64.
    """
    features = features.double()
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp().item()


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity of all pairs of different rows of [n,D], in O(n*D): |sum|^2 is the sum over all pairs."""
    unit = F.normalize(features.double(), dim=1)
    n = len(unit)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).item()
