"""Colour distortion and blur against torchvision and PIL, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dmtjepa.config import DataSettings
from dmtjepa.data.augment import augment, blur, distort_colors
from dmtjepa.data.sampling import BLUR_DRAW, COLOR_DRAW, NUM_DRAWS, draw_uniforms
from tests.helpers.images import smooth_image


def draw_images(count: int) -> torch.Tensor:
    rng = np.random.default_rng(4)
    return torch.stack([torch.from_numpy(np.array(smooth_image(rng, 40, 32))).permute(2, 0, 1) for _ in range(count)])


def one_operation(number: int, u: float, order: float = 0.0) -> np.ndarray:
    """Draws that leave everything as it is but one of brightness, contrast, saturation, hue."""
    draws = np.full((1, NUM_DRAWS), 0.9)
    draws[0, COLOR_DRAW : COLOR_DRAW + 6] = [0.0, 0.5, 0.5, 0.5, 0.5, order]
    draws[0, COLOR_DRAW + 1 + number] = u
    return draws


def test_each_operation_is_torchvisions():
    from torchvision.transforms.v2 import functional as F  # no other test needs it, and some run where it is not

    image = draw_images(1)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for number, operation in enumerate(adjust):
        for u in (0.05, 0.4, 0.95):
            factor = (2 * u - 1) * 0.2 if number == 3 else 0.2 + 1.6 * u
            expected = operation(image, factor).int()
            difference = (distort_colors(image, one_operation(number, u), 1.0).int() - expected).abs()
            assert difference.float().mean() < 1.0, (number, u)
            assert difference.max() <= 4, (number, u)


def test_images_of_a_batch_are_independent_and_grey_is_grey():
    images = draw_images(12)
    uniforms = np.stack([draw_uniforms(0, 0, position) for position in range(12)])
    together = distort_colors(images, uniforms, 0.7)
    for row in range(12):
        assert torch.equal(together[row : row + 1], distort_colors(images[row : row + 1], uniforms[row : row + 1], 0.7))
    grey = uniforms[:, COLOR_DRAW + 6] < 0.2
    assert grey.any()
    assert torch.equal(together[grey][:, 0], together[grey][:, 2])
    assert any(not torch.equal(together[row], images[row]) for row in range(12))


def test_zero_strength_changes_no_colour():
    images = draw_images(4)
    uniforms = np.stack([draw_uniforms(0, 0, position) for position in range(4)])
    uniforms[:, COLOR_DRAW + 6] = 0.9
    assert torch.equal(distort_colors(images, uniforms, 0.0), images)


def test_blur_is_gaussian_for_every_second_image():
    images = draw_images(2)
    uniforms = np.full((2, NUM_DRAWS), 0.9)
    uniforms[0, BLUR_DRAW : BLUR_DRAW + 2] = [0.1, 0.5]  # sigma 1.05
    blurred = blur(images, uniforms)
    assert torch.equal(blurred[1], images[1])
    assert not torch.equal(blurred[0], images[0])
    expected = Image.fromarray(images[0].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.05))
    difference = np.abs(blurred[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected, int))
    assert difference.max() <= 3


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_nothing():
    images = draw_images(12)
    uniforms = np.stack([draw_uniforms(0, 0, position) for position in range(12)])
    settings = DataSettings(use_color_distortion=True, color_jitter_strength=0.5, use_gaussian_blur=True)
    expected, device = augment(images, uniforms, settings), images.cuda()
    augment(device, uniforms, settings)  # the first call loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augment(device, uniforms, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.cpu().int() - expected.int()).abs().max() <= 2
