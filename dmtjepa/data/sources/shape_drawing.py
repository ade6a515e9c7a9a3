"""Draws images of textured objects on textured grounds, each with its mask.

An image shows one object of its class, at any position, size and angle, among scraps of other things, under uneven
light. As in natural images, a class has its usual material and its usual two colours (`usual_share`). No single pixel
and no mean identifies the class: every colour belongs to four classes, either colour can be that of the pattern or of
its ground, and the surroundings of the object are as textured as the object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

DRAWING_VERSION = 2  # raised by every change to what is drawn


@dataclass(frozen=True)
class ShapesParameters:
    """The parameters of the drawn set, which determine every pixel."""

    num_train: int = 4000
    num_val: int = 1000
    image_size: int = 96
    usual_share: float = 0.85  # of the objects with the usual material of their class, and with its usual colours
    seed: int = 0


# ---- Outlines: signed distances, negative inside, for x and y in units of the object's radius ----------------------


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.8


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.66) - 0.24


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.72


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * math.cos(math.pi / 6) + y * 0.5, -y) - 0.46


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.92, y - 0.28), np.maximum(x - 0.28, y - 0.92))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points. Within a fifth of the circle, the edge is a line from the tip to the notch."""
    step = 2 * math.pi / 5
    angle = np.abs((np.arctan2(y, x) + step / 2) % step - step / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.42 * math.cos(step / 2), 0.42 * math.sin(step / 2)
    edge_x, edge_y = notch_x - 1.0, notch_y
    return ((px - 1.0) * edge_y - py * edge_x) / math.hypot(edge_x, edge_y)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.92, 0.78 - np.hypot(x - 0.5, y))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), y + 0.15
    lobes = np.hypot(x - 0.4, y - 0.42) - 0.46
    body = np.maximum(0.75 * x + 0.66 * y - 0.64, 0.78 * x - 0.62 * y - 0.55)
    return np.minimum(lobes, np.maximum(body, y - 0.5))


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    shaft = np.maximum(np.abs(y) - 0.2, np.abs(x + 0.35) - 0.55)
    head = np.maximum(0.72 * x + 0.69 * np.abs(y) - 0.68, -(x + 0.02))
    return np.minimum(shaft, head)


def _bars(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(np.abs(y) - 0.5) - 0.24, np.abs(x) - 0.8)


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "arrow": _arrow,
    "bars": _bars,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASS_NAMES = tuple(OUTLINES)


# ---- Materials: fields in 0..1 over the image, with a period of a few pixels ---------------------------------------


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1]: `cells` random values per side, enlarged by bicubic interpolation."""
    values = rng.random((cells + 1, cells + 1)).astype(np.float32)
    image = Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image), 0, 1)


def _clouds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = len(x)
    field = 0.5 * _noise(rng, size, 5) + 0.3 * _noise(rng, size, 11) + 0.2 * _noise(rng, size, 23)
    return np.clip((field - 0.5) * 2.2 + 0.5, 0, 1)


def _grain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(0.8 * x + 7 * _noise(rng, len(x), 4) + 2 * _noise(rng, len(x), 16))


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 2 * np.sin(x), 0, 1)


def _checks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 3 * np.sin(x / 1.4) * np.sin(y / 1.4), 0, 1)


def _dots(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 3 * (np.cos(x) + np.cos(y) - 0.75), 0, 1)


def _bricks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(y / 5)
    edge = np.maximum(np.abs((x + 5 * (row % 2)) % 10 - 5), 2 * np.abs(y % 5 - 2.5))  # 5 at the joint
    return np.clip(5.2 - 1.2 * edge, 0, 1)


def _waves(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(x + 2.2 * np.sin(y / 2.2))


def _scales(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(y / 4)
    dx, dy = (x + 4 * (row % 2)) % 8 - 4, y % 4
    return np.clip(np.hypot(dx / 4, dy / 4), 0, 1)


def _speckles(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip((_noise(rng, len(x), len(x) // 3) - 0.55) * 5, 0, 1)


def _fur(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = len(x)
    streaks = Image.fromarray(rng.random((size // 2, size // 10)).astype(np.float32))
    field = np.asarray(streaks.resize((size, size), Image.Resampling.BICUBIC))
    bend = np.rint(6 * _noise(rng, size, 4)).astype(int)
    rows = (np.arange(size)[:, None] + bend) % size
    return np.clip(np.take_along_axis(field, rows, axis=0), 0, 1)


_MATERIALS = (_clouds, _grain, _stripes, _checks, _dots, _bricks, _waves, _scales, _speckles, _fur)


# The colours of a class: each pair of five hues, as fractions of the colour circle.
_PAIRS = tuple((first / 5, second / 5) for first in range(5) for second in range(first + 1, 5))
# Grounds and scraps are paler than objects.
_PALE = 0.35


# ---- Images -------------------------------------------------------------------------------------------------------


def draw_image(parameters: ShapesParameters, label: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `number` of a class: (RGB uint8 [S,S,3], mask uint8 [S,S]: 0 is the ground, 1 + label the object)."""
    rng = np.random.default_rng([parameters.seed, label, number])
    size = parameters.image_size
    rows, columns = np.mgrid[:size, :size].astype(np.float32)

    def paint_random_material() -> np.ndarray:
        hue = rng.random()
        return _paint(rng, rng.integers(len(_MATERIALS)), (hue, hue), rows, columns, saturation=_PALE)

    image = paint_random_material()
    for _ in range(rng.integers(1, 4)):
        image = _blend(image, paint_random_material(), _cover(_draw_scrap(rng, rows, columns)))

    radius = size * rng.uniform(0.3, 0.46)
    center = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - 0.75 * radius)
    angle = rng.uniform(-math.pi, math.pi)
    stretch = rng.uniform(0.85, 1.18)

    def distance(shift: float, grow: float) -> np.ndarray:
        x, y = columns - center[0] - shift, rows - center[1] - shift
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        unit = radius * grow
        return OUTLINES[CLASS_NAMES[label]](x / unit * stretch, y / unit / stretch) * unit

    image = image * (1 - 0.45 * _cover(distance(0.03 * size, 1.02), 4))[..., None]  # its shadow
    outside = distance(0, 1)
    material = label if rng.random() < parameters.usual_share else rng.integers(len(_MATERIALS))
    hues = _PAIRS[label if rng.random() < parameters.usual_share else rng.integers(len(_PAIRS))]
    # Twice as coarse as the rest, so that a patch of 8 pixels can show a single colour.
    body = _paint(rng, material, hues, rows, columns, period=2.0)
    body = body * (0.72 + 0.28 * np.clip(-outside / (0.16 * radius), 0, 1))[..., None]  # darker towards the edge
    covered = _cover(outside)
    image = _blend(image, body, covered)
    if rng.random() < 0.4:  # something thin in front
        strand = _cover(_draw_strand(rng, rows, columns))
        image = _blend(image, paint_random_material(), strand)
        covered = covered * (1 - strand)

    light = 1 + rng.uniform(0.1, 0.45) * _slope(rng, rows, columns)
    image = image * light[..., None] * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
    image = image + rng.normal(0, rng.uniform(0.005, 0.03), image.shape)
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return pixels, np.where(covered > 0.5, label + 1, 0).astype(np.uint8)


def _cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """From the signed distance in pixels to the covered fraction of each pixel."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _blend(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    return below + (above - below) * share[..., None]


def _slope(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A plane from -1 to 1 in a random direction, 0 at the centre."""
    angle = rng.uniform(-math.pi, math.pi)
    half = len(rows) / 2
    return ((columns - half) * math.cos(angle) + (rows - half) * math.sin(angle)) / (half * math.sqrt(2))


def _paint(
    rng: np.random.Generator,
    material: int | np.integer,
    hues: tuple[float, float],
    rows: np.ndarray,
    columns: np.ndarray,
    saturation: float = 1.0,
    period: float = 1.0,
) -> np.ndarray:
    """A material in two colours near the two hues, with random angle, period and warp: [S,S,3] in [0, 1]."""
    size = len(rows)
    angle = rng.uniform(-math.pi, math.pi)
    frequency = 96 / size * rng.uniform(0.55, 1.25) / period
    warp = rng.uniform(0, 5)
    x = (columns * math.cos(angle) + rows * math.sin(angle) + warp * _noise(rng, size, 4)) * frequency
    y = (rows * math.cos(angle) - columns * math.sin(angle) + warp * _noise(rng, size, 4)) * frequency
    field = _MATERIALS[material](rng, x, y)
    first, second = (
        to_rgb(hue + rng.uniform(-0.04, 0.04), saturation * rng.uniform(0.55, 0.9), rng.uniform(*values))
        for hue, values in zip(hues, ((0.6, 0.95), (0.4, 0.85)), strict=True)
    )
    if rng.random() < 0.5:
        first, second = second, first
    return (second + (first - second) * field[..., None]).astype(np.float32)


def to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV (hue as a fraction of the circle) to RGB in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def _draw_scrap(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A convex polygon of 3 to 6 sides at a random place, of no class: signed distance in pixels."""
    size = len(rows)
    center = rng.uniform(0, size, 2)
    sides = rng.integers(3, 7)
    angles = np.sort(rng.uniform(0, 2 * math.pi / sides, sides) + 2 * math.pi / sides * np.arange(sides))
    reaches = size * rng.uniform(0.05, 0.14, sides)
    edges = [
        (columns - center[0]) * math.cos(angle) + (rows - center[1]) * math.sin(angle) - reach
        for angle, reach in zip(angles, reaches, strict=True)
    ]
    return np.maximum.reduce(edges)


def _draw_strand(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A thin band across the image: signed distance in pixels."""
    size = len(rows)
    offset = rng.uniform(-0.3, 0.3) * size
    line = _slope(rng, rows, columns) * size / math.sqrt(2)
    return np.abs(line - offset + 4 * _noise(rng, size, 3)) - size * rng.uniform(0.01, 0.035)
