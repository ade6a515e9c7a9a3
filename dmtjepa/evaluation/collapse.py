"""Signs of collapse: features that hardly differ from image to image, or that fill few dimensions.

The numbers need no labels and are cheap: they can be taken of a batch of targets during training as of a data set's
features afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_COSINE = 0.99
MIN_RANK = 2.0


@dataclass(frozen=True)
class CollapseNumbers:
    """Of n features of D dimensions.

    effective_rank: RankMe, from 1 (a single direction) to min(n, D).
    effective_rank_centered: the same less the mean feature: directions in which features differ.
    feature_std: mean over dimensions of the standard deviation over features.
    feature_std_min: its smallest dimension.
    mean_cosine: mean cosine similarity of two different features; 1 when all point the same way.
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
        """Whether features are all but the same: mean cosine above 0.99, or fewer than 2 directions of difference."""
        return self.mean_cosine > MAX_COSINE or self.effective_rank_centered < MIN_RANK


@torch.no_grad()
def collapse_numbers(features: Tensor) -> CollapseNumbers:
    """Collapse numbers of features [n,D] of any float type and device, n at least 2; float64 inside.

    Raises:
        ValueError: fewer than two features, or one that is not finite.
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

    exp of the entropy of the singular values divided by their sum: the number of equally strong directions that
    would be as spread out. Singular values come from the smaller Gram matrix in float64.
    """
    features = features.double()
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp().item()


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity over all pairs of different rows of [n,D]; n*D work, for |sum|^2 holds all pairs."""
    unit = F.normalize(features.double(), dim=1)
    n = len(unit)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).item()
