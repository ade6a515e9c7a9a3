"""Colour distortion and blur of whole batches, driven by the random numbers of each sample.

Both loaders call these functions after cropping, so that they give the same images. The parameters are those of SimCLR
(Chen et al., arXiv 2002.05709, appendix A), which I-JEPA's settings follow.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional as F

from dmtjepa.config import DataSettings
from dmtjepa.data.sampling import BLUR_DRAW, COLOR_DRAW

_ORDERS = list(itertools.permutations(range(4)))
_LUMA = (0.299, 0.587, 0.114)
_BLUR_RADIUS = 6  # three standard deviations of the widest blur


def augment(images: torch.Tensor, uniforms: np.ndarray, settings: DataSettings) -> torch.Tensor:
    """Apply the augmentations that the settings enable: images [B,C,H,W] uint8, uniforms [B,NUM_DRAWS] in [0, 1)."""
    if settings.use_color_distortion:
        images = distort_colors(images, uniforms, settings.color_jitter_strength)
    if settings.use_gaussian_blur:
        images = blur(images, uniforms)
    return images


def distort_colors(images: torch.Tensor, uniforms: np.ndarray, strength: float) -> torch.Tensor:
    """Colour jitter with probability 0.8, its four operations in random order, then greyscale with probability 0.2.

    images [B,3,H,W] uint8, uniforms [B,NUM_DRAWS] in [0, 1) -> [B,3,H,W] uint8. The factors of brightness, contrast and
    saturation are uniform in 1 +- 0.8*strength (not below 0). The hue is rotated by at most 0.2*strength of the circle.
    """
    draws = uniforms[:, COLOR_DRAW : COLOR_DRAW + 7]
    max_change = 0.8 * strength
    low, high = max(0.0, 1 - max_change), 1 + max_change
    factors = np.concatenate(
        [low + draws[:, 1:4] * (high - low), (2 * draws[:, 4:5] - 1) * min(0.2 * strength, 0.5)], 1
    )
    orders = np.array(_ORDERS)[(draws[:, 5] * len(_ORDERS)).astype(int)]
    jittered = draws[:, 0] < 0.8
    operations = (_scale_brightness, _scale_contrast, _scale_saturation, _rotate_hue)

    pixels = images.float()
    for place, (index, operation) in itertools.product(range(4), enumerate(operations)):
        chosen = np.flatnonzero(jittered & (orders[:, place] == index))
        if len(chosen):
            selected = _to_device(chosen, images.device)
            factor = _to_device(factors[chosen, index].astype(np.float32), images.device).view(-1, 1, 1, 1)
            pixels[selected] = operation(pixels[selected], factor).clamp_(0, 255)
    grey = _to_device(draws[:, 6] < 0.2, images.device).view(-1, 1, 1, 1)
    return torch.where(grey, _luma(pixels), pixels).round_().to(torch.uint8)


def blur(images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
    """Gaussian blur with probability 0.5, standard deviation uniform in [0.1, 2] pixels: [B,C,H,W] uint8 in and out."""
    chosen = np.flatnonzero(uniforms[:, BLUR_DRAW] < 0.5)
    if not len(chosen):
        return images
    selected = _to_device(chosen, images.device)
    sigma = _to_device((0.1 + 1.9 * uniforms[chosen, BLUR_DRAW + 1]).astype(np.float32), images.device)
    distance = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=images.device, dtype=torch.float32)
    kernel = torch.softmax(-0.5 * (distance / sigma[:, None]) ** 2, dim=1)  # [n, 13], sums to 1
    count, channels, height, width = images[selected].shape
    kernel = kernel.repeat_interleave(channels, dim=0)[:, None]  # [C*n, 1, 13]: one filter per image and channel
    pixels = images[selected].float().view(1, count * channels, height, width)
    padded = F.pad(pixels, (_BLUR_RADIUS,) * 4, mode="replicate")
    pixels = F.conv2d(padded, kernel[:, :, None, :], groups=count * channels)
    pixels = F.conv2d(pixels, kernel[:, :, :, None], groups=count * channels)
    blurred = images.clone()
    blurred[selected] = pixels.view(count, channels, height, width).round_().clamp_(0, 255).to(torch.uint8)
    return blurred


def _to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device without making the host wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def _scale_brightness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return pixels * factor


def _scale_contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.lerp(_luma(pixels).mean((2, 3), keepdim=True), pixels, factor)


def _scale_saturation(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.lerp(_luma(pixels), pixels, factor)


def _rotate_hue(pixels: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of the HSV hexcone by a fraction of the circle: [B,3,H,W] in [0, 255]."""
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    peak = pixels.argmax(1)
    sixths = torch.where(peak == 0, green - blue, torch.where(peak == 1, blue - red, red - green)).unsqueeze(1)
    sixths = sixths / chroma.clamp(min=1e-6) + 2 * peak.unsqueeze(1) + 6 * fraction
    offsets = torch.arange(5, 0, -2, device=pixels.device, dtype=torch.float32).view(1, 3, 1, 1)
    k = (offsets + sixths) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
