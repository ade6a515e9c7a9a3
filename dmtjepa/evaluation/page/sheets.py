"""The figures of a report as one picture each, without text, for loggers."""

from __future__ import annotations

import base64
import io

from PIL import Image

from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.page.pictures import Gallery, Picture, make_galleries

SIDE = 200
"""Longest side of a tile in pixels."""
GAP = 4
FRAMES = {"good": "#2f9e44", "bad": "#e03131"}
"""Colors of frames: a nearest image has the class of its image, or another."""


def make_sheets(data: FigureData) -> dict[str, bytes]:
    """JPEG files by the name of the figure: `masks`, `neighbors`, `pca`, `nearest`; those that there is data for.

    A column belongs to an image; of `nearest` a row does, which begins with the image.
    """
    return {gallery.name: _make_sheet(gallery) for gallery in make_galleries(data)}


def _make_sheet(gallery: Gallery) -> bytes:
    pictures = [[(picture, _decode(picture)) for picture in group] for group in gallery.groups]
    rows = pictures if gallery.wide else [list(row) for row in zip(*pictures, strict=True)]
    scale = SIDE / max(rows[0][0][1].size)
    width, height = (max(1, round(scale * side)) for side in rows[0][0][1].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), "white")
    for r, row in enumerate(rows):
        for c, (picture, image) in enumerate(row):
            left, top = GAP + c * (width + GAP), GAP + r * (height + GAP)
            if picture.tone:
                sheet.paste(FRAMES[picture.tone], (left - GAP, top - GAP, left + width + GAP, top + height + GAP))
            filtering = Image.Resampling.NEAREST if picture.pixelated else Image.Resampling.BILINEAR
            sheet.paste(image.resize((width, height), filtering), (left, top))
    file = io.BytesIO()
    sheet.save(file, "jpeg", quality=88)
    return file.getvalue()


def _decode(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGB")
