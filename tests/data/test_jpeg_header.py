"""Plain JPEGs are recognised by their header."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dmtjepa.data.jpeg_header import read_plain_size
from tests.helpers.images import encode, smooth_image


def test_plain_jpegs_are_recognised():
    image = smooth_image(np.random.default_rng(0), 31, 17)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_plain_size(encode(image, "JPEG")) == (31, 17)
    assert read_plain_size(encode(image, "JPEG", progressive=True)) == (31, 17)
    assert read_plain_size(encode(image.convert("L"), "JPEG")) == (31, 17)
    assert read_plain_size(encode(image, "JPEG", quality=50, comment=b"x" * 999)) == (31, 17)
    for data in (
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "JPEG", exif=exif),
        encode(image, "PNG"),
        encode(image, "JPEG")[:-2],
        encode(image, "JPEG")[:300],
        b"",
        b"\xff\xd8",
    ):
        assert read_plain_size(data) is None
    exif[0x0112] = 1
    assert read_plain_size(encode(image, "JPEG", exif=exif)) == (31, 17)
    buffer = io.BytesIO(encode(image, "JPEG"))
    assert Image.open(buffer).size == (31, 17)
