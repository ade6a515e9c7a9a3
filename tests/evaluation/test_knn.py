import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

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
