"""The pictures that loggers get."""

import io

import numpy as np
from PIL import Image

from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.page.sheets import FRAMES, GAP, make_sheets


def test_each_figure_is_a_picture_of_tiles(everything):
    sheets = make_sheets(everything)  # 3 images of 32x48 pixels, each with 2 nearest ones
    assert list(sheets) == ["masks", "neighbors", "pca", "nearest", "segmentation"]
    tiles = {"masks": (3, 1), "neighbors": (3, 1), "pca": (3, 3), "nearest": (3, 3), "segmentation": (2, 5)}
    for name, (columns, rows) in tiles.items():
        with Image.open(io.BytesIO(sheets[name])) as sheet:
            assert sheet.size == (columns * (200 + GAP) + GAP, rows * (133 + GAP) + GAP)
            assert np.asarray(sheet).std() > 10


def test_frames_tell_who_has_the_class_of_the_image(everything):
    """Nearest to each are one of its own class, and a cat."""
    with Image.open(io.BytesIO(make_sheets(everything)["nearest"])) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for row, names in enumerate((("good", "bad"), ("good", "good"), ("good", "bad"))):
        for column, tone in enumerate(names, start=1):
            corner = pixels[1 + row * (133 + GAP) : 3 + row * (133 + GAP), 60 + column * (200 + GAP)].mean(0)
            expected = [int(FRAMES[tone][place : place + 2], 16) for place in (1, 3, 5)]
            assert np.abs(corner - expected).max() < 60, (row, column)


def test_without_images_there_is_none():
    assert make_sheets(FigureData(grid_size=(4, 6))) == {}
