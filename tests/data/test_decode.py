"""Decoding of the kinds of images that turn up in folders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dmtjepa.data.decode import CorruptImage, decode_image
from tests.helpers.images import encode, smooth_image


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_formats(form: str):
    image = smooth_image(np.random.default_rng(0), 80, 60)
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = decode_image(encode(image, form, **options))
    assert decoded.mode == "RGB"
    assert decoded.size == (80, 60)
    difference = np.abs(np.asarray(decoded, int) - np.asarray(image, int))
    if form in ("GIF", "JPEG"):
        assert difference.mean() < 12
    else:
        assert difference.max() == 0


def test_modes_become_rgb():
    ramp = np.linspace(0, 255, 64).reshape(8, 8)
    grey = Image.fromarray(ramp.astype(np.uint8))
    expected = np.repeat(np.asarray(grey, int)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(decode_image(encode(grey)), int), expected)
    assert np.array_equal(np.asarray(decode_image(encode(grey.convert("LA"))), int), expected)
    sixteen = Image.fromarray(np.rint(ramp * 257).astype(np.uint16))
    assert np.abs(np.asarray(decode_image(encode(sixteen)), int) - expected).max() <= 1
    floats = Image.fromarray((ramp / 255).astype(np.float32))
    assert np.abs(np.asarray(decode_image(encode(floats, "TIFF")), int) - expected).max() <= 1
    color = smooth_image(np.random.default_rng(1), 16, 16)
    cmyk = np.asarray(decode_image(encode(color.convert("CMYK"), "JPEG", quality=98)), int)
    assert np.abs(cmyk - np.asarray(color, int)).mean() < 4
    palette = color.quantize(64)
    assert np.array_equal(np.asarray(decode_image(encode(palette))), np.asarray(palette.convert("RGB")))


def test_exif_orientation_is_applied():
    image = smooth_image(np.random.default_rng(2), 24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    decoded = decode_image(encode(image, "PNG", exif=exif))
    assert decoded.size == (16, 24)
    assert np.array_equal(np.asarray(decoded), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_corrupt_bytes_are_refused_with_a_reason():
    whole = encode(smooth_image(np.random.default_rng(3), 64, 64), "JPEG")
    png = encode(smooth_image(np.random.default_rng(3), 64, 64))
    for data, reason in (
        (b"", "empty file"),
        (b"no image at all", "cannot identify"),
        (whole[: len(whole) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
    ):
        with pytest.raises(CorruptImage, match=reason):
            decode_image(data)


def test_a_decompression_bomb_is_refused():
    data = encode(Image.new("1", (20_000, 20_000)))
    with pytest.raises(CorruptImage, match="DecompressionBomb"):
        decode_image(data)
    wide = encode(Image.new("1", (20_000, 20)))
    assert decode_image(wide).size == (20_000, 20)
