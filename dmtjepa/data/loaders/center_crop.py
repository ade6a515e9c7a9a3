"""Images for measuring features: each once, in order, resized and cut at the centre."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dmtjepa.data.decode import CorruptImage, decode_image, tell_reason
from dmtjepa.data.loaders.base import start_workers
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.processes import enter_worker

logger = logging.getLogger(__name__)


class _Center(Dataset):
    """Image -> (uint8 [3,S,S] or None where corrupt, number, reason)."""

    def __init__(self, source: ImageSource, image_size: tuple[int, int]) -> None:
        self._source, self._size = source, image_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, image: int) -> tuple[torch.Tensor | None, int, str]:
        try:
            picture = decode_image(self._source.read(image))
        except (CorruptImage, OSError) as error:
            return None, image, tell_reason(error)
        return torch.from_numpy(crop_center(picture, self._size)).permute(2, 0, 1), image, ""


def crop_center(picture: Image.Image, image_size: tuple[int, int]) -> np.ndarray:
    """Shorter side to 256/224 of the crop's, then the central crop: uint8 [H,W,3].

    An image too small for the margin is only enlarged to the crop itself: its borders are not cut off.
    """
    height, width = image_size
    fit = max(width / picture.width, height / picture.height)
    scale = fit * min(256 / 224, max(1.0, 1 / fit))
    resized_width = max(width, round(picture.width * scale))
    resized_height = max(height, round(picture.height * scale))
    left, top = round((resized_width - width) / 2), round((resized_height - height) / 2)
    picture = picture.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    return np.array(picture.crop((left, top, left + width, top + height)))


def _collate(samples: list) -> tuple[torch.Tensor, list[int], list[tuple[int, str]]]:
    good = [(pixels, image) for pixels, image, _ in samples if pixels is not None]
    corrupt = [(image, reason) for pixels, image, reason in samples if pixels is None]
    images = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0)
    return images, [image for _, image in good], corrupt


class EvaluationLoader:
    """Iterates (images uint8 [B,3,S,S], labels [B] int64 or None, names [B]); the last batch may be smaller.

    Corrupt images are left out, named in the log, and listed in `corrupt` as (name, reason).
    """

    def __init__(
        self, source: ImageSource, image_size: tuple[int, int], batch_size: int, *, num_workers: int = 0
    ) -> None:
        self.source, self.corrupt = source, []
        self.class_names = source.class_names
        parent = os.getpid()
        self._loader = DataLoader(
            _Center(source, image_size),
            batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
            worker_init_fn=lambda worker: enter_worker(parent),
        )

    @property
    def num_images(self) -> int:
        return len(self.source)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, list[str]]]:
        self.corrupt = []
        for images, numbers, corrupt in start_workers(self._loader):
            for image, reason in corrupt:
                self.corrupt.append((self.source.name(image), reason))
                logger.warning("left out a corrupt image: %s: %s", *self.corrupt[-1])
            if numbers:
                labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[numbers])
                yield images, labels, [self.source.name(image) for image in numbers]
