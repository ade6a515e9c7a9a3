"""Order and crops of samples: distributions, and that they depend on (seed, epoch, position) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmtjepa.data.sampling import MAX_ATTEMPTS, SampleOrder, candidate_images, choose_crop, draw_uniforms, permute


def test_every_image_once_per_epoch_and_orders_differ():
    orders = [permute(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(orders[0], permute(1000, 0, 0))
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_global_batch_has_the_same_samples_at_any_world_size(world_size: int):
    whole = SampleOrder(100, 8, seed=3)
    parts = [SampleOrder(100, 8 // world_size, 3, rank, world_size) for rank in range(world_size)]
    assert all(part.steps_per_epoch == whole.steps_per_epoch == 12 for part in parts)
    for epoch, step in ((0, 0), (2, 11)):
        _, positions, images = whole.request(epoch, step)
        assert np.array_equal(positions, np.concatenate([part.request(epoch, step).positions for part in parts]))
        assert np.array_equal(images, np.concatenate([part.request(epoch, step).images for part in parts]))


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 3), (7, 1), (1, 8), (50, 2)])
def test_processes_share_an_epoch_without_repeating_or_losing_a_sample(batch_size: int, world_size: int):
    """Beyond the end that fills no global batch."""
    images = []
    for rank in range(world_size):
        order = SampleOrder(103, batch_size, 5, rank, world_size)
        images += [image for step in range(order.steps_per_epoch) for image in order.request(1, step).images.tolist()]
    assert len(images) == len(set(images)) == 103 - 103 % (batch_size * world_size)
    assert set(images) == set(permute(103, 5, 1)[: len(images)].tolist())


def test_uniforms_are_uniform_and_of_one_sample_alone():
    draws = np.stack([draw_uniforms(5, 1, position) for position in range(2000)])
    assert abs(draws.mean() - 0.5) < 0.005
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.07
    assert np.array_equal(draws[7], draw_uniforms(5, 1, 7))
    assert len(np.unique(draws[:, 0])) == 2000
    assert not np.array_equal(draws[7], draw_uniforms(5, 2, 7))
    assert not np.array_equal(draws[7], draw_uniforms(6, 1, 7))


def test_replacements_are_spread_over_the_data_set():
    drawn = list(candidate_images(7, seed=0, epoch=0, position=3, num_images=10))
    assert drawn[0] == 7
    assert len(drawn) == MAX_ATTEMPTS
    assert set(drawn[1:]) == set(range(10))
    assert drawn[1:] != list(candidate_images(7, 0, 0, 4, 10))[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, (0.3, 1.0)), (90, 300, (0.08, 0.6)), (12, 9, (0.3, 1.0))]
)
def test_crop_boxes_have_torchvisions_distribution(width: int, height: int, scale: tuple[float, float]):
    from scipy.stats import ks_2samp
    from torchvision.transforms import v2

    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(32, scale=scale)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    params = [transform.make_params([image]) for _ in range(10_000)]
    theirs = np.array([(p["left"], p["top"], p["width"], p["height"]) for p in params])
    ours = np.array([choose_crop(width, height, draw_uniforms(0, 0, p), scale) for p in range(10_000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    measures = [lambda box, column=column: box[:, column] for column in range(4)]
    measures += [lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]]
    for measure in measures:
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (20_000, 20), (3, 2)])
def test_extreme_images_get_a_box_within_them(size: tuple[int, int]):
    for position in range(50):
        left, top, width, height = choose_crop(*size, draw_uniforms(0, 0, position), (0.3, 1.0))
        assert width >= 1
        assert height >= 1
        assert 0 <= left <= size[0] - width
        assert 0 <= top <= size[1] - height
