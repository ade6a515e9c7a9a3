import pytest
import torch
import torch.nn.functional as F

from dmtjepa.config.settings import PatchSettings
from dmtjepa.evaluation.collapse import collapse_numbers, effective_rank, mean_cosine
from dmtjepa.evaluation.verdict import shows_collapse


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_rank_of_equal_singular_values_is_their_number(shape):
    orthogonal = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))[0]
    features = {(8, 8): 3 * torch.eye(8), (8, 20): orthogonal.T, (20, 8): orthogonal}[shape]
    assert effective_rank(features) == pytest.approx(8, rel=1e-6)


def test_rank_of_known_singular_values():
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0] for n in (30, 9))
    # exp of the entropy of (1/2, 1/4, 1/8, 1/8), which is 1.75 bits.
    assert effective_rank(left @ singular.diag() @ right.T) == pytest.approx(2**1.75, rel=1e-6)


def test_rank_of_one_direction_is_one():
    assert effective_rank(torch.outer(torch.randn(50), torch.randn(16))) == pytest.approx(1, abs=1e-3)


def test_mean_cosine_is_the_mean_over_pairs():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    pairs = [F.cosine_similarity(features[i], features[j], dim=0) for i in range(12) for j in range(12) if i != j]
    assert mean_cosine(features) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_numbers_of_healthy_features():
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) * 2
    numbers = collapse_numbers(features)
    assert (numbers.num_features, numbers.num_dimensions) == (4000, 16)
    assert numbers.effective_rank == pytest.approx(16, rel=0.01)
    assert numbers.feature_std == pytest.approx(2, rel=0.02)
    assert numbers.feature_std_min <= numbers.feature_std
    assert abs(numbers.mean_cosine) < 0.01
    assert not numbers.collapsed


def test_features_that_are_all_alike_are_collapsed():
    features = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).repeat(100, 1)
    assert collapse_numbers(features).collapsed
    assert collapse_numbers(features + 0.01 * torch.randn(100, 32)).collapsed


@pytest.mark.parametrize("count", [2, 3, 9, 10])
def test_few_features_are_not_collapsed_because_they_are_few(count):
    """The centred rank of three images is at most 2."""
    features = torch.randn(count, 32, generator=torch.Generator().manual_seed(0))
    assert not collapse_numbers(features).collapsed
    assert collapse_numbers(features[:1].repeat(count, 1) + 0.001 * features).collapsed


def test_features_that_differ_along_one_line_are_collapsed():
    line = torch.outer(torch.linspace(-1, 1, 100), torch.randn(32))
    numbers = collapse_numbers(line + torch.randn(32))
    assert numbers.effective_rank_centered == pytest.approx(1, abs=1e-3)
    assert numbers.mean_cosine < 0.99
    assert numbers.collapsed


@pytest.mark.parametrize(("share", "collapsed"), [(0.08, False), (0.06, True)])
def test_the_report_and_the_verdict_call_the_same_features_collapsed(share, collapsed):
    """Images that are alike have similar features, with a mean cosine of 1 / (1 + share**2), in many dimensions."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(64, generator=generator), dim=0)
    numbers = collapse_numbers(features + share * F.normalize(torch.randn(200, 64, generator=generator)))
    look = {"step": 0, "features/mean_cosine": numbers.mean_cosine, "features/effective_rank_centered": 20.0}
    assert numbers.mean_cosine == pytest.approx(1 / (1 + share**2), abs=1e-3)
    assert numbers.collapsed == shows_collapse(look, PatchSettings()) == collapsed


def test_takes_a_batch_of_targets_in_bfloat16():
    targets = torch.randn(64, 24, dtype=torch.bfloat16)
    assert 15 < collapse_numbers(targets).effective_rank <= 24


@pytest.mark.parametrize("features", [torch.randn(1, 4), torch.randn(2, 3, 4)])
def test_refuses_what_is_not_a_set_of_features(features):
    with pytest.raises(ValueError, match="n at least 2"):
        collapse_numbers(features)


def test_refuses_nan():
    with pytest.raises(ValueError, match="not finite"):
        collapse_numbers(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]))
