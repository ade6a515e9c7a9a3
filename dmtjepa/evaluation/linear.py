"""Linear probes: multinomial logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmtjepa.evaluation.errors import EvaluationError

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the L2 penalty that are tried, strongest first. Each starts from the solution of the previous one."""
MAX_ROTATED = 1280
"""Features of more dimensions are not rotated to their principal components, which would take longer than it saves."""
MIN_ROWS = 10
"""Rows that a probe needs: one of ten is held out to choose the penalty."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised features: float32 weight [D,L] and bias [L] of L classes, mean and scale [D].

    decay: the penalty that was chosen.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    decay: float

    def predict(self, features: Tensor) -> Tensor:
        """The class of each row: float [n,D] -> int64 [n], on the device of the probe."""
        features = (features.to(self.weight) - self.mean) / self.scale
        return (features @ self.weight + self.bias).argmax(1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share (0 to 1) of rows whose class is predicted: float [n,D], int64 [n]."""
        return (self.predict(features) == labels.to(self.weight.device)).float().mean().item()


def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    decays: Sequence[float] = DECAYS,
    max_iterations: int = 100,
    device: torch.device | str = "cpu",
) -> LinearProbe:
    """Fit logistic regression by full-batch L-BFGS. The penalty is chosen on a tenth of the training rows.

    Up to `MAX_ROTATED` dimensions, the weights of principal components are fitted, each in the unit in which the loss
    is about equally curved in all of them. The solution is the same, and is found in a fraction of the iterations.

    The loss is mean cross entropy + decay / 2 * |weight|^2 over standardised features; the bias has no penalty. Every
    tenth row, in an order shuffled with a fixed seed, is held out to choose the penalty. Then all rows are fitted.

    Args:
        features: float [n,D]. labels: int64 [n], classes from 0.
        decays: strengths of the penalty to choose from.

    Raises:
        EvaluationError: fewer than 10 rows.
    """
    if len(features) < MIN_ROWS:
        raise EvaluationError(f"a linear probe needs at least {MIN_ROWS} labelled rows, not {len(features)}")
    features = features.to(device).float()
    labels = labels.to(device)
    mean = features.mean(0)
    # A constant feature holds no information. Divided by its rounding noise it would be larger than all others.
    scale = features.std(0).clamp_min(1e-4 * features.std().clamp_min(1e-12))
    features = (features - mean) / scale
    num_classes = int(labels.max()) + 1
    variances, rotation = _principal_components(features)
    if rotation is not None:
        features = features @ rotation
    shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, kept = shuffled[::10], shuffled[torch.arange(len(shuffled), device=device) % 10 != 0]

    weight = features.new_zeros(features.shape[1], num_classes)
    bias = features.new_zeros(num_classes)
    best = (-1.0, decays[0], weight, bias)
    for decay in sorted(decays, reverse=True):
        units = (variances * (num_classes - 1) / num_classes**2 + decay).rsqrt()
        weight, bias = _minimise(features[kept], labels[kept], weight, bias, decay, units, max_iterations)
        accuracy = ((features[held_out] @ weight + bias).argmax(1) == labels[held_out]).float().mean().item()
        if accuracy > best[0]:
            best = (accuracy, decay, weight, bias)
    _, decay, weight, bias = best
    units = (variances * (num_classes - 1) / num_classes**2 + decay).rsqrt()
    weight, bias = _minimise(features, labels, weight, bias, decay, units, max_iterations)
    if rotation is not None:
        weight = rotation @ weight
    return LinearProbe(weight, bias, mean, scale, decay)


def _principal_components(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """The variances [D] of the principal components of centred features [n,D], and the rotation [D,D] to them.

    Without a rotation, all variances are 1: those of standardised features.
    """
    unrotated = features.new_ones(features.shape[1]), None
    if features.shape[1] > MAX_ROTATED:
        return unrotated
    covariance = features.T.double() @ features.double() / len(features)
    try:
        variances, rotation = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:  # it may not converge for collapsed features
        if not covariance.isfinite().all():
            raise
        return unrotated
    return variances.clamp_min(0).float(), rotation.float()


@torch.enable_grad()
def _minimise(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float, units: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Go from `weight` [D,L] and `bias` [L] to the minimum of the loss; a row of weights is counted in its unit [D]."""
    features = features * units
    # A row for each class: on a CPU, products with a thin matrix take up to ten times as long in the other layout.
    scaled = (weight.T / units).contiguous().requires_grad_()
    bias = bias.clone().requires_grad_()
    penalty = decay / 2 * units.square()
    optimizer = torch.optim.LBFGS(
        [scaled, bias], max_iter=max_iterations, tolerance_change=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, scaled, bias), labels) + (penalty * scaled.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scaled.detach() * units).T, bias.detach()
