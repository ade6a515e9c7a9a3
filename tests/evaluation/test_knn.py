import numpy as np
import pytest
import torch

from dmtjepa.evaluation import knn


@pytest.fixture
def blobs():
    """Overlapping classes, so that neighbours disagree: 200 training rows, 90 queries, 5 classes, 16 dimensions."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(5, 16))
    train_labels, labels = rng.integers(5, size=200), rng.integers(5, size=90)
    train = centers[train_labels] + rng.normal(scale=1.5, size=(200, 16))
    queries = centers[labels] + rng.normal(scale=1.5, size=(90, 16))
    return [torch.from_numpy(a) for a in (train, train_labels, queries, labels)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_scikit_learn(blobs, k, weighted):
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, queries, labels = (tensor.numpy() for tensor in blobs)
    weights = (lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform"
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(train, train_labels)
    accuracy = knn.knn_accuracy(*blobs, num_neighbors=(k,), weighted=weighted)
    assert accuracy[k] == pytest.approx(theirs.score(queries, labels))
    assert 0.2 < accuracy[k] < 0.9  # neither chance nor trivial: the comparison could fail


def test_several_k_at_once_and_in_small_chunks(blobs, monkeypatch):
    separate = {k: knn.knn_accuracy(*blobs, num_neighbors=(k,))[k] for k in (5, 10, 20)}
    monkeypatch.setattr(knn, "SIMILARITIES", 7 * 200)
    assert knn.knn_accuracy(*blobs, num_neighbors=(5, 10, 20)) == separate


def test_labels_of_the_nearest_are_found():
    train = torch.eye(4)
    assert knn.knn_accuracy(train, torch.arange(4), 3 * train, torch.arange(4), num_neighbors=(1,)) == {1: 1.0}
    assert knn.knn_accuracy(train, torch.arange(4), train, torch.arange(4).flip(0), num_neighbors=(1,)) == {1: 0.0}


def test_tiny_temperature_is_the_nearest_neighbour(blobs):
    """exp(similarity / 1e-4) alone would overflow."""
    nearest = knn.knn_accuracy(*blobs, num_neighbors=(1,))[1]
    assert knn.knn_accuracy(*blobs, num_neighbors=(20,), temperature=1e-5)[20] == nearest


@pytest.mark.parametrize("k", [0, 201])
def test_refuses_k_outside_the_training_set(blobs, k):
    with pytest.raises(ValueError, match="from 1 to the size of the training set, which is 200"):
        knn.knn_accuracy(*blobs, num_neighbors=(k,))


def test_standardized_features_have_the_training_sets_mean_and_scale():
    train, features = 3 + 2 * torch.randn(50, 4), torch.randn(20, 4)
    train[:, 3] = 7.0  # a dead dimension stays finite
    a, b = knn.standardize(train, features)
    torch.testing.assert_close(a[:, :3].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(a[:, :3].std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(b[:, :3], (features - train.mean(0))[:, :3] / train.std(0, correction=0)[:3])
    assert b.isfinite().all()
    # A constant that all images share hides their differences from the cosine, and not from this.
    labels = torch.arange(50) % 2
    informative = torch.stack([torch.full((50,), 1e3), labels + 0.01 * torch.randn(50)], dim=1)
    train, features = knn.standardize(informative, informative)
    assert knn.knn_accuracy(train, labels, features, labels)[5] == 1
