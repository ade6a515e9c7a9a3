"""The evaluation loader: every image once, in order, resized and cropped at the centre."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dmtjepa.data.crop import crop_center
from dmtjepa.data.decode import MAX_MEGAPIXELS, CorruptImage, decode_image, tell_reason
from dmtjepa.data.loaders.base import start_workers
from dmtjepa.data.sources.base import DataError, ImageSource, make_printable
from dmtjepa.processes import enter_worker

logger = logging.getLogger(__name__)


class _CenterCrops(Dataset[Any]):
    """Image number -> (uint8 [C,H,W] or None if it is corrupt, the number, the reason or an error to raise)."""

    def __init__(
        self,
        source: ImageSource,
        image_size: tuple[int, int],
        max_megapixels: float,
        channels: int,
        max_value: float | None,
    ) -> None:
        self._source, self._size = source, image_size
        self._limits = max_megapixels, channels, max_value

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, image: int) -> tuple[torch.Tensor | None, int, str | DataError]:
        try:
            decoded = decode_image(self._source.read(image), *self._limits)
        except DataError as error:  # an error that a worker raises would arrive as a traceback
            return None, image, error
        except (CorruptImage, OSError) as error:
            try:
                return None, image, tell_reason(error)
            except DataError as lack:
                return None, image, lack
        return torch.from_numpy(crop_center(decoded, self._size)).permute(2, 0, 1), image, ""


def _collate(samples: list[Any]) -> tuple[torch.Tensor, list[int], list[tuple[int, str | DataError]]]:
    good = [(pixels, image) for pixels, image, _ in samples if pixels is not None]
    corrupt = [(image, reason) for pixels, image, reason in samples if pixels is None]
    images = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0)
    return images, [image for _, image in good], corrupt


class EvaluationLoader:
    """Iterates over (images uint8 [B,C,H,W], labels [B] int64 or None, names [B]). The last batch may be smaller.

    Corrupt images are left out, and listed in `corrupt` as (name, reason). The log names those that are not in `named`,
    which they are added to: several loaders of the same images can share it.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: tuple[int, int],
        batch_size: int,
        *,
        num_workers: int = 0,
        channels: int = 3,
        max_value: float | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
        named: set[str] | None = None,
    ) -> None:
        self.source = source
        self._named = set() if named is None else named
        self.corrupt: list[tuple[str, str]] = []
        self.class_names = source.class_names
        parent = os.getpid()
        self._loader = DataLoader(
            _CenterCrops(source, image_size, max_megapixels, channels, max_value),
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
                if isinstance(reason, DataError):
                    raise reason
                name = self.source.name(image)
                self.corrupt.append((name, reason))
                if name not in self._named:
                    self._named.add(name)
                    logger.warning("left out a corrupt image: %s: %s", make_printable(name), reason)
            if numbers:
                labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[numbers])
                yield images, labels, [self.source.name(image) for image in numbers]
