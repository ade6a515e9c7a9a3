"""Crops of a decoded image, resized to the size of the input of the model."""

from __future__ import annotations

import numpy as np
from PIL import Image


def crop_and_resize(image: Image.Image, box: tuple[int, int, int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Crop box (left, top, width, height) resized to (height, width), bilinear with antialiasing: uint8 [H,W,3]."""
    left, top, width, height = box
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image.resize(image_size[::-1], Image.Resampling.BILINEAR))


def crop_center(image: Image.Image, image_size: tuple[int, int]) -> np.ndarray:
    """Resize the shorter side to 256/224 of that of the crop, then take the central crop: uint8 [H,W,3].

    An image that is too small for this margin is enlarged only as far as the crop needs, so that its borders are kept.
    """
    height, width = image_size
    fit = max(width / image.width, height / image.height)
    scale = fit * min(256 / 224, max(1.0, 1 / fit))
    resized_width = max(width, round(image.width * scale))
    resized_height = max(height, round(image.height * scale))
    left, top = round((resized_width - width) / 2), round((resized_height - height) / 2)
    image = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    return np.array(image.crop((left, top, left + width, top + height)))
