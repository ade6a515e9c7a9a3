"""`shapes`: drawn pictures of textured objects on textured grounds, so that training needs no download.

An image shows one object of its class, at any place, size and angle, among scraps of other things, under uneven
light. As things in the world do, a class has its usual material and its usual two colours (`usual_share`). No single
pixel and no mean tells them: every colour belongs to four classes, either colour can be the pattern or the ground of
it, and what surrounds the object is as textured as the object.

The set is a pure function of its parameters. It is written once, as JPEG files in a folder per class with PNG masks
beside them, into a cache folder whose name holds a hash of the parameters:

    <cache>/shapes-<hash>/{train,val}/<class>/00000.jpg          RGB
    <cache>/shapes-<hash>/masks/{train,val}/<class>/00000.png    0: ground, 1 + class index: the object
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dmtjepa.data.cache import cache_folder
from dmtjepa.processes import die_with_parent

logger = logging.getLogger(__name__)

_DRAWING_VERSION = 2  # of this file: a change to what is drawn raises it
_SPLITS = "train", "val"


@dataclass(frozen=True)
class ShapesParameters:
    """What determines the drawn set."""

    num_train: int = 4000
    num_val: int = 1000
    image_size: int = 96
    usual_share: float = 0.85  # of the objects that have their class's material, and of those that have its colours
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
    """Five points: within a fifth of the circle the edge is a line from the tip to the notch."""
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


# ---- Materials: fields in 0..1 over the picture, of a period of a few pixels ---------------------------------------


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in 0..1: `cells` random values a side, cubically enlarged."""
    values = rng.random((cells + 1, cells + 1)).astype(np.float32)
    picture = Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(picture), 0, 1)


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


# The colours of a class: each pair of five hues, as shares of the colour circle.
_PAIRS = tuple((first / 5, second / 5) for first in range(5) for second in range(first + 1, 5))
# Grounds and scraps are paler than objects.
_PALE = 0.35


# ---- A picture ------------------------------------------------------------------------------------------------------


def draw_image(parameters: ShapesParameters, label: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture `number` of a class: (uint8 [S,S,3] RGB, uint8 [S,S] mask: 0 ground, 1 + label object)."""
    rng = np.random.default_rng([parameters.seed, label, number])
    size = parameters.image_size
    rows, columns = np.mgrid[:size, :size].astype(np.float32)

    def paint_something() -> np.ndarray:
        hue = rng.random()
        return _paint(rng, rng.integers(len(_MATERIALS)), (hue, hue), rows, columns, saturation=_PALE)

    picture = paint_something()
    for _ in range(rng.integers(1, 4)):
        picture = _blend(picture, paint_something(), _cover(_draw_scrap(rng, rows, columns)))

    radius = size * rng.uniform(0.3, 0.46)
    center = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - 0.75 * radius)
    angle = rng.uniform(-math.pi, math.pi)
    stretch = rng.uniform(0.85, 1.18)

    def distance(shift: float, grow: float) -> np.ndarray:
        x, y = columns - center[0] - shift, rows - center[1] - shift
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        unit = radius * grow
        return OUTLINES[CLASS_NAMES[label]](x / unit * stretch, y / unit / stretch) * unit

    picture = picture * (1 - 0.45 * _cover(distance(0.03 * size, 1.02), 4))[..., None]  # its shadow
    outside = distance(0, 1)
    material = label if rng.random() < parameters.usual_share else rng.integers(len(_MATERIALS))
    hues = _PAIRS[label if rng.random() < parameters.usual_share else rng.integers(len(_PAIRS))]
    # Twice as coarse as the rest: a patch of 8 pixels sees the colours one by one.
    body = _paint(rng, material, hues, rows, columns, period=2.0)
    body = body * (0.72 + 0.28 * np.clip(-outside / (0.16 * radius), 0, 1))[..., None]  # darker towards the edge
    covered = _cover(outside)
    picture = _blend(picture, body, covered)
    if rng.random() < 0.4:  # something thin in front
        strand = _cover(_draw_strand(rng, rows, columns))
        picture = _blend(picture, paint_something(), strand)
        covered = covered * (1 - strand)

    light = 1 + rng.uniform(0.1, 0.45) * _slope(rng, rows, columns)
    picture = picture * light[..., None] * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
    picture = picture + rng.normal(0, rng.uniform(0.005, 0.03), picture.shape)
    pixels = np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    return pixels, np.where(covered > 0.5, label + 1, 0).astype(np.uint8)


def _cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Signed distance in pixels -> covered share of each pixel."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _blend(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    return below + (above - below) * share[..., None]


def _slope(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A plane through 0 at the centre, from -1 to 1, in a random direction."""
    angle = rng.uniform(-math.pi, math.pi)
    half = len(rows) / 2
    return ((columns - half) * math.cos(angle) + (rows - half) * math.sin(angle)) / (half * math.sqrt(2))


def _paint(
    rng: np.random.Generator,
    material: int,
    hues: tuple[float, float],
    rows: np.ndarray,
    columns: np.ndarray,
    saturation: float = 1.0,
    period: float = 1.0,
) -> np.ndarray:
    """A material in two colours near two hues: [S,S,3] in 0..1, at a random angle, period and warp."""
    size = len(rows)
    angle = rng.uniform(-math.pi, math.pi)
    frequency = 96 / size * rng.uniform(0.55, 1.25) / period
    warp = rng.uniform(0, 5)
    x = (columns * math.cos(angle) + rows * math.sin(angle) + warp * _noise(rng, size, 4)) * frequency
    y = (rows * math.cos(angle) - columns * math.sin(angle) + warp * _noise(rng, size, 4)) * frequency
    field = _MATERIALS[material](rng, x, y)
    first, second = (
        _color(hue + rng.uniform(-0.04, 0.04), saturation * rng.uniform(0.55, 0.9), rng.uniform(*values))
        for hue, values in zip(hues, ((0.6, 0.95), (0.4, 0.85)), strict=True)
    )
    if rng.random() < 0.5:
        first, second = second, first
    return (second + (first - second) * field[..., None]).astype(np.float32)


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV (hue as a share of the circle) -> RGB in 0..1."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def _draw_scrap(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A convex polygon of 3 to 6 sides anywhere, of no class: signed distance in pixels."""
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
    """A thin band across the picture: signed distance in pixels."""
    size = len(rows)
    offset = rng.uniform(-0.3, 0.3) * size
    line = _slope(rng, rows, columns) * size / math.sqrt(2)
    return np.abs(line - offset + 4 * _noise(rng, size, 3)) - size * rng.uniform(0.01, 0.035)


# ---- The set on disk ------------------------------------------------------------------------------------------------


def find_shapes(parameters: ShapesParameters = ShapesParameters(), cache: Path | None = None) -> Path:
    """The folder of the drawn set, drawn now if the cache does not hold it.

    Written beside its place and renamed when whole, so that a killed run leaves no half set, and of several processes
    that start together each gets a whole one.
    """
    key = json.dumps({"version": _DRAWING_VERSION, **asdict(parameters)}, sort_keys=True)
    folder = (cache or cache_folder()) / f"shapes-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("drawing %d images into %s", parameters.num_train + parameters.num_val, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_set(parameters, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_set(parameters: ShapesParameters, folder: Path) -> None:
    (folder / "parameters.json").write_text(json.dumps(asdict(parameters), indent=2) + "\n")
    for split in _SPLITS:
        for name in CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
            (folder / "masks" / split / name).mkdir(parents=True)
    total = parameters.num_train + parameters.num_val
    processes = min(len(os.sched_getaffinity(0)), 16, total)
    # Spawned, not forked: the caller may have started CUDA or threads.
    with multiprocessing.get_context("spawn").Pool(processes, die_with_parent) as pool:
        chunks = [(parameters, folder, start, min(start + 250, total)) for start in range(0, total, 250)]
        pool.starmap(_write_images, chunks)


def _write_images(parameters: ShapesParameters, folder: Path, start: int, stop: int) -> None:
    for number in range(start, stop):
        split = "train" if number < parameters.num_train else "val"
        label = number % len(CLASS_NAMES)
        pixels, mask = draw_image(parameters, label, number)
        place = Path(split, CLASS_NAMES[label], f"{number:05d}")
        Image.fromarray(pixels).save((folder / place).with_suffix(".jpg"), quality=92)
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(_PALETTE)
        picture.save((folder / "masks" / place).with_suffix(".png"))


_PALETTE = [0, 0, 0, *(round(255 * part) for i in range(len(CLASS_NAMES)) for part in _color(i / 10, 0.7, 0.95))]
