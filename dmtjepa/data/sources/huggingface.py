"""Images of a Hugging Face data set: `hf:` and a folder, a parquet file, or a name on the hub.

The package `datasets` opens it. Rows are read in any order from memory-mapped Arrow files: those of `save_to_disk`, or
those that `datasets` writes to its cache, once, from parquet files.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmtjepa.data.sources.base import (
    DataError,
    LazyLabels,
    Names,
    describe_classes,
    file_size,
    label_names,
    number_labels,
    read_file,
)

logger = logging.getLogger(__name__)

PREFIX = "hf:"
_OPTIONS = ("config", "image", "label")
_IMAGE_NAMES = ("image", "img")  # of the column, where the types do not tell
_LABEL_NAMES = ("label", "labels")


class Reference(NamedTuple):
    """What `hf:LOCATION[:SPLIT][,config=NAME][,image=COLUMN][,label=COLUMN]` names; None for what it leaves out."""

    location: str
    split: str | None
    config: str | None
    image: str | None
    label: str | None

    def with_split(self, split: str) -> str:
        """The text that names a split of this data set."""
        options = "".join(f",{name}={getattr(self, name)}" for name in _OPTIONS if getattr(self, name))
        return f"{PREFIX}{self.location}:{split}{options}"


def is_reference(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a Hugging Face data set."""
    return os.fspath(path).startswith(PREFIX)


def parse_reference(path: str | os.PathLike[str]) -> Reference:
    """Split the text that names a data set into its parts.

    Raises:
        DataError: it names nothing, or has an option that is not known.
    """
    location, *options = os.fspath(path).removeprefix(PREFIX).split(",")
    values: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS or not value:
            raise DataError(f"{path}: {option!r} is not one of {', '.join(f'{known}=...' for known in _OPTIONS)}")
        values[name] = value
    location, split = os.path.expanduser(location), None
    if not os.path.exists(location):
        match = re.fullmatch(r"(.+):([\w.-]+)", location)
        if match:
            location, split = match[1], match[2]
    if not location:
        raise DataError(f"{path}: name a folder or a data set after {PREFIX}, such as {PREFIX}uoft-cs/cifar10")
    return Reference(location, split, *(values.get(name) for name in _OPTIONS))


def find_split_pair(path: str | os.PathLike[str], validation_names: Sequence[str]) -> tuple[Path, Path] | None:
    """The split `train` of a data set and the first of `validation_names` that it has.

    None if it has no such two, or another split than `train` is named.

    Raises:
        DataError: the data set cannot be opened.
    """
    reference = parse_reference(path)
    splits = _open_splits(reference)
    if reference.split in (None, "train") and "train" in splits:
        for name in validation_names:
            if name in splits:
                return Path(reference.with_split("train")), Path(reference.with_split(name))
    return None


def _open_splits(reference: Reference) -> Mapping[str, Any]:
    """The splits of a data set by name. A folder that `Dataset.save_to_disk` wrote has one, of the name ""."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{PREFIX}{reference.location} is read by Hugging Face's package datasets, which cannot be imported: "
            f"pip install 'dmtjepa[hf]' ({error})"
        ) from error
    location = Path(reference.location)
    local = location.exists()
    if not local and reference.location.startswith((".", "/", "~")):
        raise DataError(f"the data set {location} does not exist (after {PREFIX} stands a folder or a name on the hub)")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if (location / "dataset_dict.json").is_file() or (location / "state.json").is_file():
            found = datasets.load_from_disk(os.fspath(location))
        elif location.is_file():
            found = datasets.load_dataset("parquet", data_files=os.fspath(location))
        else:
            found = datasets.load_dataset(reference.location, reference.config)
    except Exception as error:  # the builders of datasets raise nearly every type
        hint = "" if local else "; a name needs a network, or a cache that holds it"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{PREFIX}{reference.location} cannot be opened: {lines[0]}{hint}") from error
    return found if isinstance(found, datasets.DatasetDict) else {"": found}


class HuggingFaceSource(LazyLabels):
    """The rows of a split of a Hugging Face data set, in their order.

    The images are the one column of the type `Image`, or of encoded bytes; the labels are the one column of the type
    `ClassLabel`, or the column `label`. Options of the path name others.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reference = parse_reference(path)
        splits = _open_splits(reference)
        split = _choose_split(reference, splits)
        dataset = splits[split]
        if not len(dataset):
            raise DataError(f"{path}: the split {split} has no rows")
        self._path = reference.with_split(split) if split else f"{PREFIX}{reference.location}"
        self._location, self._split = reference.location, split
        self._image_column = _find_images(dataset, reference)
        self._label_column = _find_labels(dataset, reference)
        columns = [name for name in (self._image_column, self._label_column) if name is not None]
        self._rows = dataset.select_columns(columns).with_format("arrow")  # nothing is decoded

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, image: int) -> str:
        return f"{self._path}[{image}]"

    def describe(self) -> str:
        split = f"the split {self._split} of " if self._split else ""
        return f"{len(self)} images{describe_classes(self.class_names)} in {split}{PREFIX}{self._location}"

    def keys(self) -> Names:
        return Names([b"%d" % row for row in range(len(self))])

    def size(self, image: int) -> int:
        value = self._value(image)
        if not value.is_valid:
            return -1
        data = value["bytes"] if hasattr(value, "keys") else value
        if data.is_valid:
            return int(data.as_buffer().size)  # without reading them
        path = value.as_py().get("path") if hasattr(value, "keys") else None
        return file_size(os.fsencode(path)) if path else -1

    def read(self, image: int) -> bytes:
        value = self._value(image).as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return bytes(data)
        if not path:
            raise OSError(errno.ENODATA, "the row holds no image")
        return read_file(os.fsencode(path))

    def _value(self, image: int) -> Any:
        """The image of a row as a scalar of Arrow, which refers to the mapped file."""
        return self._rows[image].column(self._image_column)[0]

    def _read_labels(self) -> tuple[np.ndarray | None, list[str]]:
        if self._label_column is None:
            return None, []
        column = self._rows.select_columns([self._label_column])
        values = column[:].column(self._label_column).to_pylist()
        if any(value is None or (isinstance(value, int) and value < 0) for value in values):
            return None, []  # as in a test split whose labels are kept secret
        names = getattr(self._rows.features[self._label_column], "names", None)
        if names is not None:
            return np.array(values, np.int64), list(names)
        numbered = all(isinstance(value, int) for value in values)
        return (number_labels if numbered else label_names)([str(value).encode() for value in values])


def _choose_split(reference: Reference, splits: Mapping[str, Any]) -> str:
    """The split that is named, otherwise the only one, otherwise `train`."""
    if reference.split is None:
        if len(splits) == 1:
            return next(iter(splits))
        if "train" in splits:
            return "train"
    elif reference.split in splits:
        return reference.split
    named = "no split is named" if reference.split is None else f"there is no split {reference.split}"
    known = ", ".join(name for name in splits if name)
    raise DataError(
        f"{PREFIX}{reference.location}: {named}; "
        + (f"choose {PREFIX}{reference.location}:NAME of {known}" if known else "it has no splits, so name none")
    )


def _find_images(dataset: Any, reference: Reference) -> str:
    """The column of images: the one that is named, or the one whose type says so, or the one named `image` of these."""
    features = dataset.features
    if reference.image is not None:
        _check_column(reference.image, features, reference)
        return reference.image
    typed = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    found = typed or [name for name, feature in features.items() if _holds_bytes(feature)]
    preferred = [name for name in found if name in _IMAGE_NAMES] or found
    if len(preferred) == 1:
        return preferred[0]
    what = f"{len(found)} columns hold images ({', '.join(found)})" if found else "no column holds encoded images"
    raise DataError(
        f"{PREFIX}{reference.location}: {what}; name one as {PREFIX}{reference.location},image=COLUMN of "
        f"{', '.join(features)}"
    )


def _holds_bytes(feature: Any) -> bool:
    """Whether a feature is of encoded bytes: binary values, or {bytes, path} as images are stored."""
    if isinstance(feature, Mapping):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _find_labels(dataset: Any, reference: Reference) -> str | None:
    """The column of labels: the one that is named, or `label`, or the only one of the type `ClassLabel`."""
    features = dataset.features
    if reference.label is not None:
        _check_column(reference.label, features, reference)
        return reference.label
    typed = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    plain = [
        name for name in _LABEL_NAMES if getattr(features.get(name), "dtype", None) in ("int64", "int32", "string")
    ]
    preferred = [name for name in typed if name in _LABEL_NAMES] or typed or plain
    if len(preferred) > 1:
        logger.info(
            "%s%s has the labels %s; choose with %s%s,label=COLUMN",
            PREFIX, reference.location, ", ".join(preferred), PREFIX, reference.location,
        )  # fmt: skip
    return preferred[0] if len(preferred) == 1 else None


def _check_column(name: str, features: Mapping[str, Any], reference: Reference) -> None:
    if name not in features:
        raise DataError(f"{PREFIX}{reference.location} has no column {name}; it has {', '.join(features)}")
