"""About 270 files of every kind that turns up in image folders, and which of them are corrupt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.helpers.images import encode, smooth_image


def list_kinds() -> Iterator[tuple[str, bytes, bool]]:
    """(file name, bytes, whether it is corrupt), each name once."""
    rng = np.random.default_rng(11)
    image = smooth_image(rng, 72, 56)
    whole = dict(_list_whole(image))
    for name, data in whole.items():
        yield f"whole-{name}", data, False
    for name in (
        "plain.jpg",
        "progressive.jpg",
        "grey.jpg",
        "rgb.png",
        "palette.png",
        "lossy.webp",
        "rgb.bmp",
        "still.gif",
    ):
        data = whole[name]
        for percent in (1, 3, 6, 10, 15, 20, 30, 40, 48, 56, 64, 72, 80, 88):
            yield f"cut-{percent:02d}-{name}", data[: max(1, len(data) * percent // 100)], True
        yield f"zeroed-{name}", bytes(len(data)), True
        yield f"behind-text-{name}", b"#!/bin/sh\n" + data, True
        yield f"scrambled-{name}", rng.permutation(np.frombuffer(data, np.uint8)).tobytes(), True
    for name, data in (
        ("empty.jpg", b""),
        ("newline.png", b"\n"),
        ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("archive.jpg", b"PK\x03\x04" + bytes(100)),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"),
        ("only-start.jpg", b"\xff\xd8"),
        ("start-and-end.jpg", b"\xff\xd8\xff\xd9"),
        ("only-signature.png", b"\x89PNG\r\n\x1a\n"),
        ("bomb.png", encode(Image.new("1", (16_000, 16_000)), "PNG")),
    ):
        yield name, data, True
    for number in range(20):
        yield f"noise-{number:02d}.jpg", rng.integers(0, 256, 50 * number + 10, dtype=np.uint8).tobytes(), True
        yield f"noise-behind-header-{number:02d}.jpg", whole["plain.jpg"][:20] + rng.bytes(40 * number + 10), True
    for number in range(20):  # a frame header of impossible size
        data = bytearray(whole["plain.jpg"])
        at = data.index(b"\xff\xc0")
        data[at + 5 + number % 2 * 2 : at + 7 + number % 2 * 2] = b"\0\0" if number < 10 else b"\xff\xff"
        if number % 5:
            del data[-number * 20 :]
        yield f"size-{number:02d}.jpg", bytes(data), True


def _list_whole(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    exif = Image.Exif()
    yield "plain.jpg", encode(image, "JPEG", quality=90)
    yield "plain.JPEG", encode(image, "JPEG", quality=75)
    yield "progressive.jpg", encode(image, "JPEG", progressive=True)
    yield "grey.jpg", encode(image.convert("L"), "JPEG")
    yield "cmyk.jpg", encode(image.convert("CMYK"), "JPEG")
    yield "tiny.jpg", encode(image.resize((1, 1)), "JPEG")
    yield "wide.jpg", encode(image.resize((20_000, 9)), "JPEG")
    yield "tall.jpg", encode(image.resize((9, 20_000)), "JPEG")
    yield "actually-png.jpg", encode(image, "PNG")
    yield "actually-webp.jpg", encode(image, "WEBP")
    yield "actually-jpeg.png", encode(image, "JPEG")
    yield "rubbish-behind.jpg", encode(image, "JPEG") + b"\0" * 999
    yield "comment.jpg", encode(image, "JPEG", comment=b"hello" * 100)
    for subsampling in (0, 1, 2):
        for quality in (5, 100):
            yield f"sub{subsampling}-q{quality}.jpg", encode(image, "JPEG", quality=quality, subsampling=subsampling)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        yield f"turned-{orientation}.jpg", encode(image, "JPEG", exif=exif)
        yield f"turned-{orientation}.webp", encode(image, "WEBP", exif=exif)
    for mode in ("1", "L", "LA", "RGB", "RGBA", "P"):
        name = {"RGB": "rgb", "P": "palette"}.get(mode, f"mode-{mode}")
        yield f"{name}.png", encode(image.convert(mode), "PNG")
    yield "transparent-palette.png", encode(image.convert("P"), "PNG", transparency=3)
    yield "sixteen.png", encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG")
    yield "tiny.png", encode(image.resize((1, 1)), "PNG")
    yield "lossy.webp", encode(image, "WEBP")
    yield "lossless.webp", encode(image, "WEBP", lossless=True)
    yield "alpha.webp", encode(image.convert("RGBA"), "WEBP")
    yield "still.gif", encode(image, "GIF")
    frames = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 2
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"moving.{form.lower()}", encode(image, form, save_all=True, append_images=frames)
    for mode in ("1", "L", "RGB", "P"):
        name = "rgb" if mode == "RGB" else f"mode-{mode}"
        yield f"{name}.bmp", encode(image.convert(mode), "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg"):
        yield f"{compression}.tif", encode(image, "TIFF", compression=compression)
    yield "cmyk.tiff", encode(image.convert("CMYK"), "TIFF")
    yield "sixteen.tiff", encode(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "TIFF")
    yield "floats.tiff", encode(Image.fromarray(np.asarray(image.convert("L"), np.float32)), "TIFF")
    yield "color.ppm", encode(image, "PPM")
    yield "grey.pgm", encode(image.convert("L"), "PPM")
    yield "bits.pbm", encode(image.convert("1"), "PPM")
