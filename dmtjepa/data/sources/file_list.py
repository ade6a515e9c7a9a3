"""A text file that names images."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import numpy as np

from dmtjepa.data.sources.base import (
    IMAGE_EXTENSIONS_BYTES,
    DataError,
    Names,
    describe_classes,
    file_size,
    label_names,
    number_labels,
    read_file,
)

_NUM_CHECKED = 20  # files of a list that are checked at the start


class ListSource:
    """A text file with the path of an image on each line, and optionally its label.

    Paths are absolute, or relative to the folder of the file. A label follows a tab (any name) or a space (a whole
    number on every line, as in the file lists of DALI). Empty lines, lines that start with #, blanks at the end of a
    line, and a byte order mark are ignored.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = self.path = Path(path)
        try:
            text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise DataError(f"cannot read the list of images {path}: {error.strerror}") from error
        if b"\0" in text:
            raise DataError(f"the list of images {path} holds zero bytes: save it as UTF-8 text, not as UTF-16")
        lines = [line.rstrip() for line in text.split(b"\n")]
        lines = [line for line in lines if line.strip() and not line.startswith(b"#")]
        if not lines:
            raise DataError(f"the list of images {path} is empty; it should hold a path per line")
        names, labels = _split_labels(lines, path)
        self.labels: np.ndarray | None = None
        self.class_names: list[str] = []
        if labels:
            numbers = all(label.isdigit() for label in labels)
            self.labels, self.class_names = (number_labels if numbers else label_names)(labels)
        self._names = Names(names)
        self._folder = os.fsencode(path.parent)
        checked = [self.name(image) for image in range(min(len(names), _NUM_CHECKED))]
        if not any(os.path.lexists(name) for name in checked):
            raise DataError(
                f"{path}: none of its first {len(checked)} files exists, such as {checked[0]!r}. Paths are relative to "
                f"the list's folder; a label follows a tab, or, if all are whole numbers, a space"
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, image: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self._names[image]))

    def describe(self) -> str:
        return f"{len(self)} images{describe_classes(self.class_names)} in the list {self.path}"

    def keys(self) -> Names:
        return self._names

    def size(self, image: int) -> int:
        return file_size(os.path.join(self._folder, self._names[image]))

    def read(self, image: int) -> bytes:
        return read_file(os.path.join(self._folder, self._names[image]))


def _split_labels(lines: list[bytes], path: Path) -> tuple[list[bytes], list[bytes]]:
    """(paths, labels). The labels are empty if the lines have none."""
    fields = [line.split(b"\t") for line in lines]
    if all(len(pair) == 1 for pair in fields):
        fields = [line.rsplit(b" ", 1) for line in lines]
        numbered = [len(pair) == 2 and pair[1].isdigit() for pair in fields]
        if not all(numbered):
            images = [pair[0].lower().endswith(IMAGE_EXTENSIONS_BYTES) for pair in fields]
            if not any(number and image for number, image in zip(numbered, images, strict=True)):
                return lines, []
            fields = [pair if number else [] for pair, number in zip(fields, numbered, strict=True)]
    for line, pair in zip(lines, fields, strict=True):
        if len(pair) != 2 or not pair[0] or not pair[1]:
            raise DataError(
                f"{path}: some lines have a label after a tab, or a number after a space, but this one is not a path "
                f"and a label: {os.fsdecode(line)!r}"
            )
    return [pair[0] for pair in fields], [pair[1] for pair in fields]
