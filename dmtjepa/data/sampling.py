"""Which image is sample p of an epoch, and how it is cropped: pure functions of (seed, epoch, p).

Nothing here depends on a worker, a rank or an earlier draw. So a resumed run continues exactly, and a global batch is
the same for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Each use of (seed, epoch, sample) has a stream of random numbers of its own.
_ORDER, _CROP, _REPLACEMENT = 0, 1, 2

CROP_ATTEMPTS = 10
# This many corrupt images in a row mean that the data set is gone (a lost mount), not that an image is damaged.
MAX_ATTEMPTS = 100
# Uniform draws of a sample: 4 for each attempt at a crop box, then those of flip, colour and blur (augment.py).
FLIP_DRAW = 4 * CROP_ATTEMPTS
COLOR_DRAW = FLIP_DRAW + 1
BLUR_DRAW = COLOR_DRAW + 10
NUM_DRAWS = BLUR_DRAW + 2


def _generator(seed: int, epoch: int, stream: int, number: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox): key (seed, epoch), a separate range of counters per stream and number."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, number, stream]))


def permute(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The image at each position of an epoch: [num_images] int32, or int64 from 2**31 images on."""
    dtype = np.int32 if num_images < 2**31 else np.int64
    return _generator(seed, epoch, _ORDER).permutation(np.arange(num_images, dtype=dtype))


def draw_uniforms(seed: int, epoch: int, position: int) -> np.ndarray:
    """The random numbers of the sample at a position of the epoch: [NUM_DRAWS] float64 in [0, 1)."""
    return _generator(seed, epoch, _CROP, position).random(NUM_DRAWS)


def candidate_images(image: int, seed: int, epoch: int, position: int, num_images: int) -> Iterator[int]:
    """The image of a position, then its replacements, drawn uniformly, for when the image is corrupt."""
    yield image
    for attempt in range(1, MAX_ATTEMPTS):
        yield int(_generator(seed, epoch, _REPLACEMENT + attempt, position).integers(num_images))


def choose_crop(
    width: int,
    height: int,
    uniforms: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Crop box (left, top, width, height) in pixels, distributed as in torchvision's RandomResizedCrop.

    The area is uniform in `scale` (fractions of the image's area), the aspect ratio (width / height) log-uniform in
    `ratio`, the position uniform. If none of CROP_ATTEMPTS boxes fits, the box is the largest central one whose aspect
    ratio is in `ratio` and nearest to the image's.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_aspect, u_top, u_left = uniforms[4 * attempt : 4 * attempt + 4].tolist()
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(low + u_aspect * (high - low))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(u_top * (height - crop_height + 1))
            left = int(u_left * (width - crop_width + 1))
            return left, top, crop_width, crop_height

    crop_width, crop_height = width, height
    if width < ratio[0] * height:
        crop_height = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        crop_width = max(1, round(height * ratio[1]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


class BatchRequest(NamedTuple):
    """A batch to load: positions [B] in the order of an epoch, and the images [B] at these positions."""

    epoch: int
    positions: np.ndarray
    images: np.ndarray


class SampleOrder:
    """The positions and images of each step on this rank.

    Step s of an epoch covers the positions [s*W*B, (s+1)*W*B) of the epoch's permutation (W ranks with B images each).
    Rank r loads the B positions from s*W*B + r*B on. An incomplete global batch at the end of an epoch is dropped.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch = -1
        self._permutation = np.empty(0, np.int32)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def requests(self, epoch: int, step: int) -> Iterator[BatchRequest]:
        """The batches of this rank from a step of an epoch on, without end: the next epoch follows."""
        while True:
            yield self.request(epoch, step)
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = epoch + 1, 0

    def request(self, epoch: int, step: int) -> BatchRequest:
        """The batch of this rank at a step of an epoch."""
        if epoch != self._epoch:
            self._permutation, self._epoch = permute(self.num_images, self.seed, epoch), epoch
        start = (step * self.world_size + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        return BatchRequest(epoch, positions, self._permutation[positions].astype(np.int64))
