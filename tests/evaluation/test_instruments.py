"""Each instrument agrees with an independent computation."""

import itertools
import math

import numpy as np
import pytest
import torch

from dmtjepa.evaluation.instruments import (
    count_changed,
    describe_features,
    explained_variance,
    read_targets,
    sum_errors,
    sum_targets,
)

NUM_IMAGES, NUM_PATCHES, DIM = 5, 12, 7


def draw_batch(seed, *, blocks=3, size=4, dtype=torch.float32):
    """Targets and predictions of blocks that overlap, and the masks that name them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.stack([
        torch.stack([torch.randperm(NUM_PATCHES, generator=generator)[:size] for _ in range(blocks)])
        for _ in range(NUM_IMAGES)
    ])  # fmt: skip
    unique, slot = (blocks + NUM_PATCHES * torch.arange(NUM_IMAGES)[:, None, None]).unique(return_inverse=True)
    targets = torch.randn(len(unique), DIM, generator=generator) + 3
    predictions = targets[slot] * 0.6 + torch.randn(*slot.shape, DIM, generator=generator) * 0.5
    return predictions.to(dtype), targets.to(dtype), unique, slot


def measure(*batches):
    return read_targets(sum(sum_targets(*batch, NUM_PATCHES) for batch in batches).tolist())


def variance_explained_by(predictions, targets):
    """The definition, in float64: 1 - squared error / variance, over all predictions and dimensions."""
    error, spread = ((targets - predictions) ** 2).sum(), ((targets - targets.mean(0)) ** 2).sum()
    return 1 - error / spread


@pytest.mark.parametrize("num_batches", [1, 3])
def test_explained_variance_is_that_of_all_predictions(num_batches):
    batches = [draw_batch(seed) for seed in range(num_batches)]
    predictions = np.concatenate([p.double().numpy().reshape(-1, DIM) for p, _, _, _ in batches])
    targets = np.concatenate([t.double()[slot].numpy().reshape(-1, DIM) for _, t, _, slot in batches])
    value = measure(*batches)["explained_variance"]
    assert value == pytest.approx(variance_explained_by(predictions, targets), abs=1e-5)
    errors = sum(sum_errors(p, t, slot) for p, t, _, slot in batches)
    assert explained_variance(errors.tolist()) == pytest.approx(value, abs=1e-6)
    metrics = pytest.importorskip("sklearn.metrics")
    assert value == pytest.approx(metrics.r2_score(targets, predictions, multioutput="variance_weighted"), abs=1e-5)


def test_explained_variance_of_known_predictions():
    _, targets, unique, slot = draw_batch(0)
    assert measure((targets[slot], targets, unique, slot))["explained_variance"] == 1
    mean = targets[slot].flatten(0, 2).mean(0).expand(*slot.shape, DIM)
    assert measure((mean, targets, unique, slot))["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_variance_divides_as_all_pairs_of_patches_say():
    _, targets, unique, _ = batch = draw_batch(0)
    rows = {"all": [], "image": [], "position": []}
    for (i, a), (j, b) in itertools.combinations(enumerate(unique.tolist()), 2):
        same_image, same_position = a // NUM_PATCHES == b // NUM_PATCHES, a % NUM_PATCHES == b % NUM_PATCHES
        kind = "image" if same_image else "position" if same_position else "all"
        rows[kind].append(((targets[i] - targets[j]).double() ** 2).mean().item() / 2)
    variance, within_image, at_position = (np.mean(rows[kind]) for kind in ("all", "image", "position"))
    found = measure(batch)
    assert found["variance"] == pytest.approx(variance, rel=1e-5)
    assert found["variance_between_images"] == pytest.approx(1 - within_image / variance, abs=1e-5)
    assert found["variance_of_position"] == pytest.approx(1 - at_position / variance, abs=1e-5)


@pytest.mark.parametrize(
    ("image", "position", "rest"),
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 3)],
    ids=["image", "position", "rest", "mix"],
)
def test_shares_are_those_that_the_targets_were_drawn_with(image, position, rest):
    """The parts have known variances; single batches scatter around them, and no share is favoured."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for seed in range(200):
        predictions, _, unique, slot = draw_batch(seed)
        parts = [torch.randn(n, DIM, generator=generator) for n in (NUM_IMAGES, NUM_PATCHES, len(unique))]
        targets = image**0.5 * parts[0][unique // NUM_PATCHES] + position**0.5 * parts[1][unique % NUM_PATCHES]
        batches.append((predictions, targets + rest**0.5 * parts[2], unique, slot))
    found, total = measure(*batches), image + position + rest
    assert found["variance"] == pytest.approx(total, rel=0.1)
    assert found["variance_between_images"] == pytest.approx(image / total, abs=0.05)
    assert found["variance_of_position"] == pytest.approx(position / total, abs=0.05)
    shares = [value for name, value in found.items() if name.startswith("variance_")]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_a_small_variance_is_seen_beside_a_large_mean():
    predictions, targets, unique, slot = draw_batch(0)
    small = measure((predictions * 1e-3 + 1, targets * 1e-3 + 1, unique, slot))
    large = measure((predictions, targets, unique, slot))
    assert small.pop("variance") == pytest.approx(1e-6 * large.pop("variance"), rel=1e-2)
    assert small == pytest.approx(large, abs=1e-2)


def test_targets_that_are_all_equal_explain_nothing():
    _, targets, unique, slot = draw_batch(0)
    found = measure((torch.ones(*slot.shape, DIM), torch.ones_like(targets), unique, slot))
    assert found.pop("variance") == 0
    assert all(map(math.isnan, found.values()))


def test_bfloat16_is_measured_in_float32():
    batch = draw_batch(0, dtype=torch.bfloat16)
    assert measure(batch) == measure((batch[0].float(), batch[1].float(), *batch[2:]))


def test_changed_neighbors_are_counted_as_sets():
    before = torch.tensor([[0, 1, 2], [5, 6, -1], [7, 8, 9]])
    now = torch.tensor([[2, 0, 3], [6, 5, -1], [1, 2, -1]])
    assert count_changed(before, now).tolist() == [3, 7]  # 3, 1 and 2 of all that are not missing
    assert count_changed(now, now).tolist() == [0, 7]


def test_features_are_described_as_by_their_singular_values():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6)
    found = describe_features(features.to(torch.bfloat16).float())

    def rank(x):
        share = np.linalg.svd(x, compute_uv=False)
        share = share / share.sum()
        return math.exp(-(share * np.log(share)).sum())

    x = features.to(torch.bfloat16).double().numpy()
    assert found["effective_rank"] == pytest.approx(rank(x), rel=1e-6)
    assert found["effective_rank_centered"] == pytest.approx(rank(x - x.mean(0)), rel=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (unit @ unit.T)[~np.eye(len(x), dtype=bool)]
    assert found["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-9)


@pytest.mark.parametrize("features", [torch.ones(1, 4), torch.full((3, 4), math.nan)], ids=["one", "nan"])
def test_features_that_have_no_description(features):
    assert all(map(math.isnan, describe_features(features).values()))
