"""Reads the size of a JPEG file from its header, without decoding."""

from __future__ import annotations

from typing import Literal

_SOI, _EOI, _SOS, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman-coded
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_MAX_PIXELS = 89_478_485  # PIL warns of a decompression bomb above


def read_plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain JPEG: complete, 8 bits, grey or YCbCr, upright, of an ordinary size. Otherwise None.

    Follows the marker segments of ITU-T T.81, annex B. None does not mean that the file is corrupt: PIL decides that.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size: tuple[int, int] | None = None
    num_components = 0
    position, end = 2, len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        start, stop = position + 4, position + 2 + length
        if length < 2 or stop > end or marker in _OTHER_FRAMES or marker < 0xC0:
            return None
        if marker in _PLAIN_FRAMES:
            if size is not None or length < 8 or data[start] != 8:
                return None
            height = (data[start + 1] << 8) | data[start + 2]
            width = (data[start + 3] << 8) | data[start + 4]
            num_components = data[start + 5]
            if num_components not in (1, 3) or not 0 < width * height <= _MAX_PIXELS:
                return None
            if num_components == 3 and data[start + 6] == ord("R") and data[start + 9] == ord("G"):
                return None
            size = (width, height)
        elif marker == _APP1 and not _is_upright(data[start:stop]):
            return None
        elif marker == _APP14 and data[start : start + 5] == b"Adobe" and length >= 14 and data[start + 11] != 1:
            return None  # RGB or CMYK; grey images with this marker take the slower path through PIL
        elif marker == _SOS:
            return size if data.rfind(b"\xff\xd9", stop) > 0 else None
        elif marker in (_SOI, _EOI):
            return None
        position = stop
    return None


def _is_upright(segment: bytes) -> bool:
    """Whether an APP1 segment leaves the image as it is. Any mention of an orientation in XMP counts as a rotation."""
    if not segment.startswith(b"Exif\0\0"):
        return b"Orientation" not in segment
    tiff = segment[6:]
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return False
    order: Literal["little", "big"] = "little" if tiff[:1] == b"I" else "big"
    first = int.from_bytes(tiff[4:8], order)
    for entry in range(int.from_bytes(tiff[first : first + 2], order)):
        field = tiff[first + 2 + 12 * entry : first + 14 + 12 * entry]
        if len(field) < 12:
            return False
        if int.from_bytes(field[:2], order) == 0x0112:
            return int.from_bytes(field[8:10], order) == 1
    return True
