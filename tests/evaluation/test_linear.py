import numpy as np
import pytest
import torch

from dmtjepa.evaluation import linear
from dmtjepa.evaluation.linear import fit_linear


def make_blobs(n, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(4, 12))
    labels = rng.integers(4, size=n)
    return torch.from_numpy(centers[labels] + scale * rng.normal(size=(n, 12))).float(), torch.from_numpy(labels)


def test_equals_scikit_learn():
    """One penalty: decay/2 |w|^2 + mean loss is scikit-learn's C = 1 / (n decay)."""
    from sklearn.linear_model import LogisticRegression

    features, labels = make_blobs(300, seed=0)
    test_features, test_labels = make_blobs(400, seed=1)
    probe = fit_linear(features, labels, decays=(1e-2,), max_iterations=300)
    standard = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=1 / (300 * 1e-2), tol=1e-8, max_iter=2000).fit(standard.numpy(), labels.numpy())
    # scikit-learn's weights sum to 0 over classes at the optimum, ours too: the penalty sees to it.
    torch.testing.assert_close(probe.weight.T, torch.from_numpy(theirs.coef_).float(), atol=2e-3, rtol=0)
    standard_test = ((test_features - features.mean(0)) / features.std(0)).numpy()
    assert probe.accuracy(test_features, test_labels) == pytest.approx(
        theirs.score(standard_test, test_labels.numpy()), abs=0.006
    )


def test_principal_components_give_the_accuracy_of_scikit_learn_in_fewer_iterations(monkeypatch):
    """Pooled features are strongly correlated, which makes the loss long valleys."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    mixing = torch.logspace(0, -2, 12)[:, None] * torch.randn(12, 40, generator=generator)
    (features, labels), (test_features, test_labels) = (make_blobs(n, seed=n) for n in (400, 2000))
    features, test_features = features @ mixing, test_features @ mixing
    losses, cross_entropy = [], linear.F.cross_entropy
    monkeypatch.setattr(linear.F, "cross_entropy", lambda *pair: losses.append(cross_entropy(*pair)) or losses[-1])
    probe = fit_linear(features, labels, decays=(1e-3,))
    num_rotated = len(losses)
    monkeypatch.setattr(linear, "MAX_ROTATED", 0)
    fit_linear(features, labels, decays=(1e-3,))
    assert num_rotated < 0.6 * (len(losses) - num_rotated)

    mean, scale = features.mean(0), features.std(0)
    theirs = LogisticRegression(C=1 / (400 * probe.decay), tol=1e-6, max_iter=5000)
    theirs.fit(((features - mean) / scale).double().numpy(), labels.numpy())
    accuracy = theirs.score(((test_features - mean) / scale).double().numpy(), test_labels.numpy())
    assert probe.accuracy(test_features, test_labels) == pytest.approx(accuracy, abs=0.001)


def test_separable_classes_are_separated_whatever_the_scale_of_features():
    features, labels = make_blobs(200, seed=0, scale=0.05)
    features = features * torch.logspace(-4, 4, 12)
    assert fit_linear(features, labels).accuracy(features, labels) == 1.0


def test_penalty_is_chosen_by_held_out_rows():
    """With more dimensions than rows of pure noise around weak signals, a strong penalty generalises."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    features = torch.randn(100, 300, generator=generator)
    features[:, :20] += 0.7 * (labels * 2 - 1)[:, None]
    probe = fit_linear(features, labels, decays=(10.0, 1e-6))
    assert probe.decay == 10.0


def test_constant_feature_is_ignored():
    features, labels = make_blobs(100, seed=0)
    features[:, 3] = 1.2345
    noisy = features.clone()
    noisy[:, 3] += 1e-7
    probe = fit_linear(features, labels)
    assert torch.isfinite(probe.weight).all()
    assert torch.equal(probe.predict(features), probe.predict(noisy))


def test_components_that_cannot_be_found_are_not_needed(monkeypatch):
    """For collapsed features, `eigh` may not converge. Features that are not finite remain an error."""
    (features, labels), (test_features, test_labels) = (make_blobs(n, seed=n) for n in (300, 400))
    expected = fit_linear(features, labels).accuracy(test_features, test_labels)

    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert fit_linear(features, labels).accuracy(test_features, test_labels) == pytest.approx(expected, abs=0.01)
    features[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        fit_linear(features, labels)


def test_is_reproducible():
    features, labels = make_blobs(100, seed=0)
    assert torch.equal(fit_linear(features, labels).weight, fit_linear(features, labels).weight)


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match="at least 10 labelled rows, not 9"):
        fit_linear(torch.randn(9, 2), torch.zeros(9, dtype=torch.int64))
