"""Crops of a decoded image, resized to the size of the input of the model."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dmtjepa.data.decode import Bands, Picture

_MAX_RATIO = 8  # resized side over that of the crop, from which on an image is cut before it is resized


def crop_and_resize(image: Picture, box: tuple[int, int, int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Crop box (left, top, width, height) resized to (height, width), bilinear with antialiasing: uint8 [H,W,C]."""
    left, top, width, height = box
    image = image.crop((left, top, left + width, top + height))
    return to_array(image.resize(image_size[::-1], Image.Resampling.BILINEAR))


def crop_center(image: Picture, image_size: tuple[int, int]) -> np.ndarray:
    """Resize the shorter side to 256/224 of that of the crop, then take the central crop: uint8 [H,W,C].

    An image that is too small for this margin is enlarged only as far as the crop needs, so that its borders are kept.
    A very long image is cut before it is resized, with a margin for the filter.
    """
    height, width = image_size
    fit = max(width / image.width, height / image.height)
    scale = fit * min(256 / 224, max(1.0, 1 / fit))
    resized_width = max(width, round(image.width * scale))
    resized_height = max(height, round(image.height * scale))
    image, resized_width, resized_height = _cut_ends(image, resized_width, resized_height, image_size)
    left, top = round((resized_width - width) / 2), round((resized_height - height) / 2)
    image = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    return to_array(image.crop((left, top, left + width, top + height))).copy()


def to_array(image: Picture) -> np.ndarray:
    """The pixels, uint8 [H,W,C]."""
    if isinstance(image, Bands):
        return image.to_array()
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _cut_ends(
    image: Picture, resized_width: int, resized_height: int, image_size: tuple[int, int]
) -> tuple[Picture, int, int]:
    """Cut what is far from the central crop from an image whose resized side is over 8 times that of the crop.

    Returns the image and the size to which the rest is resized.
    """
    height, width = image_size
    if resized_width > _MAX_RATIO * width:
        kept = min(image.width, max(1, math.ceil(2 * width * image.width / resized_width)) + 8)
        left = (image.width - kept) // 2
        resized_width = max(width, round(resized_width * kept / image.width))
        image = image.crop((left, 0, left + kept, image.height))
    if resized_height > _MAX_RATIO * height:
        kept = min(image.height, max(1, math.ceil(2 * height * image.height / resized_height)) + 8)
        top = (image.height - kept) // 2
        resized_height = max(height, round(resized_height * kept / image.height))
        image = image.crop((0, top, image.width, top + kept))
    return image, resized_width, resized_height
