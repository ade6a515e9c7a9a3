"""Encoded bytes -> RGB pixels, for every kind of image that turns up in a folder."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps


class CorruptImage(ValueError):
    """Bytes that are not an image, or not a complete one. The message is the reason."""


def decode_image(data: bytes) -> Image.Image:
    """The image in RGB, upright (EXIF orientation applied), 8 bits a channel; the first frame of an animation.

    Grey, palette and CMYK images are converted, 16-bit greys scaled to 8 bits, and an alpha channel is dropped.
    Raises CorruptImage for anything else, and for decompression bombs (above 179 million pixels, the limit of PIL).
    """
    if not data:
        raise CorruptImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and many pixels: nothing to report for each image
            image: Image.Image = Image.open(io.BytesIO(data))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I") or image.mode == "F":
                image = _to_eight_bits(image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL's plugins raise nearly every type on damaged input
        reason = re.sub(r"<_io\.BytesIO[^>]*>", "", str(error))  # PIL names the object that it reads
        raise CorruptImage(f"{type(error).__name__}: {reason}"[:200].strip()) from error


def tell_reason(error: CorruptImage | OSError) -> str:
    """Why an image could not be read or decoded, in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit greys: PIL's own conversion would clip everything above 255 to white."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        values = values * (255.0 if values.max(initial=0.0) <= 1.0 else 1.0)
    elif values.max(initial=0) > 255 or image.mode.startswith("I;16"):
        values = values / 257.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
