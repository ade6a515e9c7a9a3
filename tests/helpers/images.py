"""Images for tests, and a folder of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.data import ImageSource, is_dali_installed

needs_dali = pytest.mark.skipif(not is_dali_installed(), reason="NVIDIA DALI is not installed")
LOADERS = ["pil", pytest.param("dali", marks=needs_dali)]


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image with structure at low frequencies only, so that JPEG and resizing change it little."""
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of a file of this form."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def flip_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """The same file with 1 to 5 bytes changed."""
    flipped = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(2, len(flipped), rng.integers(1, 6))
    flipped[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
    return flipped.tobytes()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEG files of different sizes in three classes, in folders of different depth."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(30):
        place = folder / ("ant", "bee/worker", "cat")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 160, 2).tolist()
        smooth_image(rng, width, height).save(place / f"{number:03d}.jpg", quality=90)
    return folder


def contents(source: ImageSource) -> list[bytes]:
    """The encoded bytes of all images."""
    return [source.read(image) for image in range(len(source))]
