"""From encoded bytes to pixels, for every kind of image that is found in image folders."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

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
_NPY_SIGNATURE = b"\x93NUMPY"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class CorruptImage(ValueError):
    """Bytes that are not an image, or not a complete one, or an image that is refused. The message is the reason."""


def decode_image(
    data: bytes, max_megapixels: float = MAX_MEGAPIXELS, channels: int = 3, max_value: float | None = None
) -> Picture:
    """The image upright (EXIF orientation applied), 8 bits per channel; the first frame of an animation.

    With three channels it is RGB: grey, palette and CMYK images are converted, and an alpha channel is dropped. With
    one it is grey. Images of other numbers of channels are taken as they are stored: LA and RGBA images of PIL, or
    arrays of NumPy (`.npy`) [H,W,C] or [C,H,W].

    16-bit values are scaled from [0, 65535], 32-bit integers from [0, 255] or, if a value is larger, from [0, 65535].
    Floats are scaled from [0, 1] or, if a value is larger than 2, from [0, 255]; values a little outside are clipped.
    Integers and floats far outside these ranges, and floats that are not finite, are refused.

    Args:
        max_megapixels: larger images, by the size that they declare, are refused before they are decoded.
        channels: of the image that is returned.
        max_value: from 0 to which values of more than 8 bits are scaled, instead of the ranges above; larger ones
            are clipped.

    Raises:
        CorruptImage: the bytes are not a complete image, or the image is too large or has other channels.
        DataError: there is not enough memory for an image within the limit.
    """
    if not data:
        raise CorruptImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and many pixels: nothing to report for each image
            if data.startswith(_NPY_SIGNATURE):
                return _convert(_load_array(data, max_megapixels, channels, max_value), channels)
            try:
                image = _load(data, max_megapixels)
            except CorruptImage:
                raise
            except ValueError:  # PIL limits the size of texts and colour profiles, which are of no use here
                if not data.startswith(_PNG_SIGNATURE):
                    raise
                image = _load(_remove_png_metadata(data), max_megapixels)
            return convert_channels(image, channels, max_value)
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:
        check_resources(error)
        raise CorruptImage("not an image that PIL can read") from error
    except Exception as error:  # the plugins of PIL raise nearly every type on damaged input
        check_resources(error)
        reason = re.sub(r"<_io\.BytesIO[^>]*>", "", str(error))  # PIL names the object that it reads
        raise CorruptImage(f"{type(error).__name__}: {reason}"[:200].strip()) from error


def convert_channels(image: Image.Image, channels: int = 3, max_value: float | None = None) -> Picture:
    """A decoded image as `decode_image` returns it.

    Raises:
        CorruptImage: values are out of range, or the image has another number of channels than is asked for.
    """
    image = _turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_eight_bits(np.asarray(image), max_value, wide=image.mode != "I"))
    if channels in (1, 3):
        mode = "RGB" if channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)
    return _convert(np.asarray(image), channels)


def _convert(values: np.ndarray, channels: int) -> Picture:
    """Pixels uint8 [H,W] or [H,W,C] as a picture of this number of channels."""
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise CorruptImage(f"{values.shape[2]} channels, not data.channels = {channels}")
    if channels in (1, 3):
        return Image.fromarray(values[..., 0] if channels == 1 else values)
    return Bands([Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(channels)])


def _load_array(data: bytes, max_megapixels: float, channels: int, max_value: float | None) -> np.ndarray:
    """A `.npy` file of numbers [H,W], [H,W,C] or [C,H,W] as uint8 [H,W,C]. No code in it is run."""
    file = io.BytesIO(data)
    shape, fortran_order, dtype = _read_array_header(file)
    if dtype.kind not in "uif":
        raise CorruptImage(f"an array of {dtype}, not of numbers")
    sides = (*shape, 1) if len(shape) == 2 else shape
    if len(sides) != 3 or channels not in (sides[0], sides[2]) or 0 in sides:
        raise CorruptImage(f"an array of shape {list(shape)}, not [H, W, {channels}] or [{channels}, H, W]")
    last = sides[2] == channels
    height, width = sides[:2] if last else sides[1:]
    if height * width > max_megapixels * 1e6:
        raise CorruptImage(f"{width}x{height} pixels exceed data.max_megapixels = {max_megapixels:g}")
    if len(data) - file.tell() < dtype.itemsize * math.prod(shape):
        raise CorruptImage("truncated array")
    flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    values = flat.reshape(shape, order="F" if fortran_order else "C").reshape(sides)
    values = values if last else values.transpose(1, 2, 0)
    return values if dtype == np.uint8 else _to_eight_bits(values, max_value, wide=dtype.itemsize == 2)


def _read_array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran's order, and dtype."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise CorruptImage(f"an array of the format version {version}")
    return read[version](file)


class Bands:
    """A picture of any number of channels, as one grey image of PIL for each, with PIL's methods of the same names.

    PIL's own LA and RGBA images are not used, because PIL weights their other channels with the last one in resizing.
    """

    def __init__(self, bands: list[Image.Image]) -> None:
        self._bands = bands
        self.size = self.width, self.height = bands[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        return Bands([band.crop(box) for band in self._bands])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Bands:
        return Bands([band.resize(size, resample) for band in self._bands])

    def histogram(self) -> list[int]:
        return [count for band in self._bands for count in band.histogram()]

    def to_array(self) -> np.ndarray:
        """Its pixels, uint8 [H,W,C]."""
        return np.stack([np.asarray(band) for band in self._bands], axis=2)


Picture: TypeAlias = Image.Image | Bands


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


def read_upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image with its EXIF orientation applied, not decoded."""
    image = read_header(data)
    is_turned = _read_orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if is_turned else (image.width, image.height)


def read_kind(data: bytes) -> tuple[str, str]:
    """Format and mode of an image as PIL names them; `NPY` and the type of its numbers for an array."""
    if data.startswith(_NPY_SIGNATURE):
        return "NPY", _read_array_header(io.BytesIO(data))[2].name
    image = read_header(data)
    return image.format or "", image.mode


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
    """Apply the EXIF orientation."""
    transposition = _TRANSPOSITIONS.get(_read_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def _read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. Metadata that cannot be read say nothing about it."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever PIL raises: the pixels are sound
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_eight_bits(values: np.ndarray, max_value: float | None, *, wide: bool) -> np.ndarray:
    """Integers and floats to 8 bits. The conversion of PIL clips all above 255 to white.

    Args:
        max_value: scale from [0, max_value], instead of what the type and the values tell.
        wide: integers are scaled from [0, 65535] even where all are below 256.
    """
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise CorruptImage("floats that are not finite")
    if max_value is not None:
        return np.rint(np.clip(values * np.float32(255 / max_value), 0, 255)).astype(np.uint8)
    if values.dtype.kind == "f":
        white = 1 if high <= 2 else 255  # values above 1 are common: reflectances, ringing after a resize
        if low < -white or high > 2 * white:
            raise CorruptImage(f"floats from {low:g} to {high:g}; only [0, 1] and [0, 255] are supported")
        return np.clip(np.rint(values * np.float32(255 / white)), 0, 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise CorruptImage(f"integers from {low} to {high}; only [0, 255] and [0, 65535] are supported")
    if high <= 255 and not wide:
        return values.astype(np.uint8)
    table = np.rint(np.arange(65536) / 257).astype(np.uint8)  # saves a copy of the image in floats
    return table[values]
