import numpy as np
import pytest
import torch

from dmtjepa.evaluation.linear import fit_linear
from dmtjepa.evaluation.low_shot import draw_per_class, measure_low_shot


def make_blobs(n, seed):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(3, 8))
    labels = rng.integers(3, size=n)
    return torch.from_numpy(centers[labels] + 1.5 * rng.normal(size=(n, 8))).float(), torch.from_numpy(labels)


def test_draws_are_of_each_class_and_differ():
    labels = np.repeat([0, 1, 2], [50, 30, 1])
    draws = [draw_per_class(labels, np.array([5, 3, 1]), seed) for seed in (0, 1)]
    for draw in draws:
        assert np.bincount(labels[draw]).tolist() == [5, 3, 1]
        assert len(set(draw.tolist())) == 9
    assert draws[0].tolist() != draws[1].tolist()
    assert draws[0].tolist() == draw_per_class(labels, np.array([5, 3, 1]), 0).tolist()


@pytest.mark.slow
def test_scores_are_those_of_probes_of_the_drawn_images():
    from sklearn.linear_model import LogisticRegression

    (train, train_labels), (features, labels) = make_blobs(600, 0), make_blobs(300, 1)
    scores = measure_low_shot(train, train_labels, features, labels)
    # 1% are 7 images, too few for a probe.
    assert list(scores) == ["10%", "5 per class", "20 per class"]
    assert scores["20 per class"].num_images == 60
    assert 60 <= scores["10%"].num_images <= 62
    expected, independent = [], []
    for seed in range(3):
        chosen = draw_per_class(train_labels.numpy(), np.array([20, 20, 20]), seed)
        probe = fit_linear(train[chosen], train_labels[chosen])
        expected.append(probe.accuracy(features, labels))
        standard = (train[chosen] - probe.mean) / probe.scale
        theirs = LogisticRegression(C=1 / (60 * probe.decay), max_iter=2000).fit(standard, train_labels[chosen])
        independent.append(theirs.score((features - probe.mean) / probe.scale, labels))
    assert scores["20 per class"].mean == pytest.approx(np.mean(expected))
    assert scores["20 per class"].std == pytest.approx(np.std(expected, ddof=1))
    assert scores["20 per class"].mean == pytest.approx(np.mean(independent), abs=0.01)


def test_classes_that_are_too_small_leave_out_what_they_have_not():
    train, labels = torch.randn(40, 4), torch.arange(40) % 4
    assert "20 per class" not in measure_low_shot(train, labels, train, labels)
