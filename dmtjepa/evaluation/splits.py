"""The images that a run is measured on: a training split to compare with, and a validation split to classify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, open_images, open_source
from dmtjepa.data.sources.base import LIST_EXTENSIONS, ImageSource, Names
from dmtjepa.data.sources.huggingface import find_split_pair, is_reference
from dmtjepa.evaluation.option_names import KEYWORDS, OptionNames

VALIDATION_NAMES = ("val", "valid", "validation", "test")
HELD_OUT = 5
"""Without a validation split, every fifth image of a class is held out for validation."""
MAX_LISTED = 5
"""Class names in a message."""


class Subset:
    """Some images of a source, with their names. `labels`, int64 [n], replaces the labels of the source."""

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

    def keys(self) -> Names:
        keys = self._source.keys()
        return Names([keys[number] for number in self._numbers.tolist()])

    def size(self, image: int) -> int:
        return self._source.size(int(self._numbers[image]))

    def read(self, image: int) -> bytes:
        return self._source.read(int(self._numbers[image]))


@dataclass(frozen=True)
class Splits:
    """The images to measure on.

    description: the names of the splits, for messages.
    unlabelled: why no accuracy can be measured, or None if it can.
    notes: classes that cannot be answered, or are not asked for.
    """

    train: ImageSource
    validation: ImageSource
    description: str
    unlabelled: str | None
    notes: list[str] = field(default_factory=list)


def find_splits(
    settings: DataSettings,
    *,
    data: Path | None = None,
    train: Path | None = None,
    validation: Path | None = None,
    max_images: int | None = None,
    options: OptionNames = KEYWORDS,
) -> Splits:
    """Find the two splits to measure on.

    `train` and `validation` name the splits. Otherwise `data` names the images, and otherwise the settings of the run
    do. Each is a folder, a file list, tar shards or a Hugging Face data set, as in training. A folder that holds train/
    and val/ (or valid/, validation/, test/) has both splits; so have train.tsv with val.tsv beside it, and a Hugging
    Face data set with such splits. From other images a fifth of each class is held out.

    Args:
        max_images: upper limit for the images of each split, which are drawn with a fixed seed.
        options: what messages call the options.

    Raises:
        DataError: images are missing, or the validation split has a class that the training split does not have.
    """
    if max_images is not None and max_images < 1:
        raise DataError(f"{options.max_images} must be at least 1, not {max_images}")
    if (train is None) != (validation is None):
        raise DataError(f"give both {options.train} and {options.validation}, or neither")
    unlabelled = None
    if train is not None and validation is not None:
        pair: tuple[str | Path, str | Path] | None = train, validation
    elif data is None and settings.dataset == "shapes":
        pair = "shapes:train", "shapes:val"
    else:
        pair = find_pair(data if data is not None else settings.path)
    first: ImageSource
    second: ImageSource
    if pair is not None:
        first, second = open_images(pair[0]), open_images(pair[1])
        description = f"{pair[0]} and {pair[1]}"
    else:
        source = open_images(data) if data is not None else open_source(settings)
        path = data if data is not None else settings.path
        first, second, unlabelled = hold_out(source, path)
        of_class = "" if source.labels is None else " of a class"
        description = f"{path} (no validation split: every {HELD_OUT}th image{of_class} is held out)"
    if first.labels is None or second.labels is None:
        unlabelled = (
            "its images are not in one folder per class, and have no labels in a list, in shards or in a column"
        )
    elif len(first.class_names) < 2:
        unlabelled = "all of its images are in one class"
    elif unlabelled is None:
        second = _match_classes(first, second)
    first, second = _thin(first, max_images), _thin(second, max_images)
    return Splits(first, second, description, unlabelled, [] if unlabelled else _compare_classes(first, second))


def find_pair(path: Path) -> tuple[Path, Path] | None:
    """The training and the validation split that `path` holds or is a part of, or None if there are no such two."""
    if is_reference(path):
        return find_split_pair(path, VALIDATION_NAMES)
    if path.suffix in LIST_EXTENSIONS and path.stem == "train":
        for name in VALIDATION_NAMES:
            if path.with_stem(name).is_file():
                return path, path.with_stem(name)
    for root in [path, path.parent] if path.name == "train" else [path]:
        for name in VALIDATION_NAMES:
            if (root / "train").is_dir() and (root / name).is_dir():
                return root / "train", root / name
    return None


def hold_out(source: ImageSource, path: Path) -> tuple[Subset, Subset, str | None]:
    """Split a source into a training and a validation split, and say why classes cannot be told apart, if so.

    Of each class every fifth image is held out; of a class of two to four images, the last one. A class of one image
    stays in the training split. If all classes have one image, every fifth image is held out, whatever its class.

    Raises:
        DataError: there is one image only.
    """
    if len(source) < 2:
        raise DataError(f"{path} has only {len(source)} image; at least 2 are needed")
    held_out, reason = _is_held_out(np.zeros(len(source), np.int64)), None
    if source.labels is not None:
        within_classes = _is_held_out(source.labels)
        if within_classes.any():
            held_out = within_classes
        else:
            reason = "each class has one image; at least two are needed, one of them for validation"
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out)), reason


def subsample(source: ImageSource, count: int) -> Subset:
    """`count` images of a source, evenly spaced, so that a source sorted by class gives several classes."""
    return Subset(source, np.linspace(0, len(source) - 1, min(count, len(source)), dtype=np.int64))


def _is_held_out(labels: np.ndarray) -> np.ndarray:
    """bool [n] for labels int64 [n]: every fifth image of a class, or the last of a class of two to four images."""
    order = np.argsort(labels, kind="stable")
    count = np.bincount(labels)
    place = np.empty(len(labels), np.int64)  # of an image within its class
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    size = count[labels]
    return (place % HELD_OUT == HELD_OUT - 1) | ((size > 1) & (size < HELD_OUT) & (place == size - 1))


def _match_classes(train: ImageSource, validation: ImageSource) -> ImageSource:
    """The validation split with its labels numbered as in the training split."""
    if train.class_names == validation.class_names:
        return validation
    assert validation.labels is not None
    order = {name: label for label, name in enumerate(train.class_names)}
    used = {validation.class_names[label] for label in np.unique(validation.labels)}
    unknown = sorted(used - order.keys())
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of the validation split are not in the training split: {_list_names(unknown)}; "
            f"both splits need the same classes"
        )
    renumber = np.array([order.get(name, -1) for name in validation.class_names])
    return Subset(validation, np.arange(len(validation)), labels=renumber[validation.labels])


def _compare_classes(train: ImageSource, validation: ImageSource) -> list[str]:
    """Notes on classes that only one of two labelled splits has images of."""
    assert train.labels is not None
    assert validation.labels is not None
    known, asked = np.unique(train.labels), np.unique(validation.labels)
    unanswerable, unasked = np.setdiff1d(asked, known), np.setdiff1d(known, asked)
    names, notes = train.class_names, []
    if len(unanswerable):
        count = int(np.isin(validation.labels, unanswerable).sum())
        notes.append(
            f"{len(unanswerable)} of {len(asked)} validation classes have no training image; their {count} images "
            f"count as wrong: {_list_names([names[label] for label in unanswerable])}"
        )
    if len(unasked):
        notes.append(
            f"{len(unasked)} of {len(known)} training classes have no validation image and are not measured: "
            f"{_list_names([names[label] for label in unasked])}"
        )
    return notes


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _thin(source: ImageSource, max_images: int | None) -> ImageSource:
    if max_images is None or len(source) <= max_images:
        return source
    numbers = np.random.default_rng(0).permutation(len(source))[:max_images]
    return Subset(source, np.sort(numbers))
