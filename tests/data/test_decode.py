"""Decoding of the kinds of images that turn up in folders."""

from __future__ import annotations

import errno
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from dmtjepa.data import DataError
from dmtjepa.data.check import examine
from dmtjepa.data.decode import CorruptImage, decode_image, tell_reason
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
        (b"no image at all", "^not an image that PIL can read$"),
        (whole[: len(whole) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
    ):
        with pytest.raises(CorruptImage, match=reason):
            decode_image(data)


@pytest.mark.slow
def test_a_decompression_bomb_is_refused():
    data = encode(Image.new("1", (20_000, 20_000)))
    with pytest.raises(CorruptImage, match="DecompressionBomb"):
        decode_image(data)
    wide = encode(Image.new("1", (20_000, 20)))
    assert decode_image(wide).size == (20_000, 20)


def exif_block(tag: int, kind: int, value: bytes, extra: bytes = b"") -> bytes:
    """EXIF with orientation 6 and one more tag."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, 1) + value
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + struct.pack("<I", 0) + extra


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        exif_block(0x8298, 5, struct.pack("<I", 38), struct.pack("<II", 7, 2)),
        exif_block(0x0100, 9, struct.pack("<i", -5)),
        exif_block(0x9204, 10, struct.pack("<I", 38), struct.pack("<ii", -1, 0)),
        exif_block(0x8825, 4, struct.pack("<I", 9999)),
        exif_block(0x0131, 77, bytes(4)),
    ],
    ids=["copyright as a rational", "negative width", "rational -1/0", "GPS pointer to nowhere", "unknown type"],
)
def test_odd_exif_tags_do_not_make_an_image_corrupt(form: str, block: bytes):
    """The orientation alone is read, and the metadata are never written again."""
    image = smooth_image(np.random.default_rng(2), 24, 16)
    assert decode_image(encode(image, form, exif=block)).size == (16, 24)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_large_metadata_of_a_png_are_ignored(kind: str):
    info, more = PngImagePlugin.PngInfo(), {}
    if kind == "zTXt":
        info.add_text("parameters", "x" * 2_000_000, zip=True)
    elif kind == "iTXt":
        info.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    else:
        more["icc_profile"] = b"z" * 3_000_000
    data = encode(Image.new("RGB", (32, 32), (9, 8, 7)), pnginfo=info, **more)
    assert decode_image(data).getpixel((0, 0)) == (9, 8, 7)
    assert examine(data)[:4] == ("PNG", "RGB", 32, 32)


def test_deep_greys_are_scaled_by_a_rule_or_refused():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(48, 0)
    above, not_finite = ramp.copy(), ramp.copy()
    above[0, 0], not_finite[0, 0] = 1.02, np.nan
    expected = np.rint(255 * ramp)
    for values in (
        ramp,
        above,
        255 * ramp,
        np.rint(65535 * ramp).astype(np.uint16),
        np.rint(65535 * ramp).astype(np.int32),
    ):
        decoded = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")), int)[..., 0]
        assert np.abs(decoded - expected)[1:].max() <= 1
    for values, reason in (
        (not_finite, "not finite"),
        (65535 * ramp, r"floats from 0 to 65535; only \[0, 1\] and \[0, 255\]"),
        ((ramp * 2**30).astype(np.int32), "integers from 0 to 1073741824"),
        (-100 * ramp, "floats from -100"),
    ):
        with pytest.raises(CorruptImage, match=reason):
            decode_image(encode(Image.fromarray(values), "TIFF"))


def test_images_that_declare_too_many_pixels_are_refused_before_decoding(monkeypatch):
    data = encode(Image.new("L", (2000, 1000)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(CorruptImage, match=r"2000x1000 pixels exceed data\.max_megapixels = 1\.5"):
        decode_image(data, max_megapixels=1.5)


def test_lack_of_memory_is_not_the_fault_of_an_image(monkeypatch):
    data = encode(Image.new("L", (200, 100)))

    def fail(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(CorruptImage, match="asks for more memory than its pixels need"):
        decode_image(data)
    monkeypatch.setattr("dmtjepa.data.decode.is_memory_left", lambda num_bytes: num_bytes < 8 * 200 * 100)
    with pytest.raises(DataError, match=r"not enough memory to load images\. Lower data\.num_workers"):
        decode_image(data)


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.ENOSPC, "/dev/shm")]
)
def test_other_limits_are_not_the_fault_of_an_image_either(code: int, remedy: str):
    with pytest.raises(DataError, match=remedy):
        tell_reason(OSError(code, os.strerror(code)))
    assert tell_reason(OSError(errno.EIO, os.strerror(errno.EIO))) == "Input/output error"
