"""Which images a run is measured on: a training split to compare with, and a validation split to classify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.data.sources.folder import FolderSource
from dmtjepa.data.sources.shapes import find_shapes

VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
HELD_OUT = 5
"""Where there is no validation folder, every fifth image is one of the validation split."""


class Subset:
    """Some images of a source, under its names; `labels` replaces the source's."""

    def __init__(self, source: ImageSource, numbers: np.ndarray, labels: np.ndarray | None = None) -> None:
        self._source, self._numbers = source, numbers
        self.class_names = source.class_names
        if labels is None and source.labels is not None:
            labels = source.labels[numbers]
        self.labels = labels

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, image: int) -> str:
        return self._source.name(int(self._numbers[image]))

    def read(self, image: int) -> bytes:
        return self._source.read(int(self._numbers[image]))


@dataclass(frozen=True)
class Splits:
    """Images to measure on. `unlabelled` says why there are no labels, and is None where there are."""

    train: ImageSource
    validation: ImageSource
    description: str
    unlabelled: str | None


def find_splits(
    settings: DataSettings,
    *,
    data: Path | None = None,
    train: Path | None = None,
    validation: Path | None = None,
    max_images: int | None = None,
) -> Splits:
    """The two splits to measure on.

    `train` and `validation` name them; else `data` names a folder that holds train/ and val/ (or valid/, validation/,
    test/), or classes, of which every fifth image is held out; else it is the data the run was trained on.

    Args:
        max_images: at most so many of each split, drawn evenly with a fixed seed.

    Raises:
        DataError: a folder or split is missing, or the validation split has classes that the training split has not.
    """
    if max_images is not None and max_images < 1:
        raise DataError(f"--max-images must be at least 1, not {max_images}")
    if (train is None) != (validation is None):
        raise DataError("give both --train and --val, or neither")
    sources: FolderSource | tuple[FolderSource, FolderSource]
    if train is not None and validation is not None:
        sources = FolderSource(train), FolderSource(validation)
    elif data is None and settings.dataset == "shapes":
        folder = find_shapes()
        sources = FolderSource(folder / "train"), FolderSource(folder / "val")
    else:
        sources = _find_in(data if data is not None else settings.path)
    if isinstance(sources, FolderSource):
        numbers = np.arange(len(sources))
        held_out = numbers % HELD_OUT == HELD_OUT - 1
        if not held_out.any():
            raise DataError(f"{sources.folder} has only {len(sources)} images; at least {HELD_OUT} are needed")
        description = f"{sources.folder} (no validation folder: every {HELD_OUT}th image held out)"
        pair: tuple[ImageSource, ImageSource] = Subset(sources, numbers[~held_out]), Subset(sources, numbers[held_out])
    else:
        description = f"{sources[0].folder} and {sources[1].folder}"
        pair = sources
    first: ImageSource = pair[0]
    second: ImageSource = pair[1]
    unlabelled = None
    if first.labels is None or second.labels is None:
        unlabelled = "its images do not lie in one folder per class"
    elif len(first.class_names) < 2:
        unlabelled = "its images are all in one class folder"
    else:
        second = _match_classes(first, second)
    return Splits(_thin(first, max_images), _thin(second, max_images), description, unlabelled)


def subsample(source: ImageSource, count: int) -> Subset:
    """`count` images of a source, evenly spread over it, so that a source sorted by class gives several classes."""
    return Subset(source, np.linspace(0, len(source) - 1, min(count, len(source)), dtype=np.int64))


def _find_in(folder: Path) -> FolderSource | tuple[FolderSource, FolderSource]:
    roots = [folder]
    if folder.name == "train":  # the run was trained on .../train, its sibling holds the other images
        roots.append(folder.parent)
    for root in roots:
        for name in VALIDATION_FOLDERS:
            if (root / "train").is_dir() and (root / name).is_dir():
                return FolderSource(root / "train"), FolderSource(root / name)
    return FolderSource(folder)


def _match_classes(train: ImageSource, validation: ImageSource) -> ImageSource:
    """The validation split with its labels numbered as the training split's."""
    if train.class_names == validation.class_names:
        return validation
    order = {name: label for label, name in enumerate(train.class_names)}
    unknown = [name for name in validation.class_names if name not in order]
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of the validation split are not in the training split: {', '.join(unknown[:5])}; "
            f"both need the same class folders"
        )
    renumber: Sequence[int] = [order[name] for name in validation.class_names]
    return Subset(validation, np.arange(len(validation)), labels=np.array(renumber)[validation.labels])


def _thin(source: ImageSource, max_images: int | None) -> ImageSource:
    if max_images is None or len(source) <= max_images:
        return source
    numbers = np.random.default_rng(0).permutation(len(source))[:max_images]
    return Subset(source, np.sort(numbers))
