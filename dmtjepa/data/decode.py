"""From encoded bytes to RGB pixels, for every kind of image that is found in image folders."""

from __future__ import annotations

import io
import re
import struct
import warnings

import numpy as np
from PIL import Image

from dmtjepa.data.resources import check_resources, is_memory_error, is_memory_left

MAX_MEGAPIXELS = 100.0  # default of `data.max_megapixels`

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class CorruptImage(ValueError):
    """Bytes that are not an image, or not a complete one, or an image that is refused. The message is the reason."""


def decode_image(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The image in RGB, upright (EXIF orientation applied), 8 bits per channel; the first frame of an animation.

    Grey, palette and CMYK images are converted, and an alpha channel is dropped. 16-bit greys are scaled from
    [0, 65535], 32-bit integers from [0, 255] or, if a value is larger, from [0, 65535]. Floats are scaled from [0, 1]
    or, if a value is larger than 2, from [0, 255]; values a little outside are clipped. Integers and floats far outside
    these ranges, and floats that are not finite, are refused.

    Args:
        max_megapixels: larger images, by the size that they declare, are refused before they are decoded.

    Raises:
        CorruptImage: the bytes are not a complete image, or the image is too large.
        DataError: there is not enough memory for an image within the limit.
    """
    if not data:
        raise CorruptImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and many pixels: nothing to report for each image
            try:
                image = _load(data, max_megapixels)
            except CorruptImage:
                raise
            except ValueError:  # PIL limits the size of texts and colour profiles, which are of no use here
                if not data.startswith(_PNG_SIGNATURE):
                    raise
                image = _load(_remove_png_metadata(data), max_megapixels)
            return to_rgb(image)
    except CorruptImage:
        raise
    except Exception as error:  # the plugins of PIL raise nearly every type on damaged input
        check_resources(error)
        reason = re.sub(r"<_io\.BytesIO[^>]*>", "", str(error))  # PIL names the object that it reads
        raise CorruptImage(f"{type(error).__name__}: {reason}"[:200].strip()) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as `decode_image` returns it. Raises CorruptImage for values that are out of range."""
    image = _turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _load(data: bytes, max_megapixels: float) -> Image.Image:
    """The image as it is stored, with its pixels loaded."""
    num_bytes = 0  # not known yet
    try:
        image = Image.open(io.BytesIO(data))
        num_bytes = 8 * image.width * image.height  # two copies with 4 bytes per pixel
        if image.width * image.height > max_megapixels * 1e6:
            raise CorruptImage(f"{image.width}x{image.height} pixels exceed data.max_megapixels = {max_megapixels:g}")
        image.load()
        return image
    except (MemoryError, OSError) as error:
        if is_memory_error(error) and is_memory_left(num_bytes):  # damaged headers can ask for any amount of memory
            raise CorruptImage(f"asks for more memory than its pixels need ({error})") from error
        raise


def read_header(data: bytes) -> Image.Image:
    """The image with its format, mode and size, not decoded."""
    try:
        return Image.open(io.BytesIO(data))
    except ValueError:  # metadata that are too large for PIL
        return Image.open(io.BytesIO(_remove_png_metadata(data)))


def tell_reason(error: CorruptImage | OSError) -> str:
    """Why an image could not be read or decoded, in a few words.

    Raises:
        DataError: the error is not the fault of the image: the system lacks memory or file descriptors.
    """
    check_resources(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _remove_png_metadata(data: bytes) -> bytes:
    """A PNG file without texts and colour profile."""
    kept, position = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind not in _PNG_METADATA:
            kept.append(data[position : position + 12 + length])
        position += 12 + length
    return b"".join(kept)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Metadata that cannot be read say nothing about it."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever PIL raises: the pixels are sound
        return image
    transposition = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit integers, 32-bit integers and floats to 8 bits. The conversion of PIL clips all above 255 to white."""
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CorruptImage("floats that are not finite")
        white = 1 if high <= 2 else 255  # values above 1 are common: reflectances, ringing after a resize
        if low < -white or high > 2 * white:
            raise CorruptImage(f"floats from {low:g} to {high:g}; only [0, 1] and [0, 255] are supported")
        return Image.fromarray(np.clip(np.rint(values * np.float32(255 / white)), 0, 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise CorruptImage(f"integers from {low} to {high}; only [0, 255] and [0, 65535] are supported")
    if high <= 255 and image.mode == "I":
        return Image.fromarray(values.astype(np.uint8))
    table = np.rint(np.arange(65536) / 257).astype(np.uint8)  # saves a copy of the image in floats
    return Image.fromarray(table[values])
