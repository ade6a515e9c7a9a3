"""Images for the data tests, and the marks of those that need DALI."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dmtjepa.data import ImageSource, is_dali_installed

needs_dali = pytest.mark.skipif(not is_dali_installed(), reason="NVIDIA DALI is not installed")
LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image with low frequencies only, which JPEG and resizing change little."""
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def flip_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    flipped = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(2, len(flipped), rng.integers(1, 6))
    flipped[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
    return flipped.tobytes()


def contents(source: ImageSource) -> list[bytes]:
    return [source.read(image) for image in range(len(source))]
