"""A text file that names images."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from dmtjepa.data.sources.base import IMAGE_EXTENSIONS_BYTES, DataError, Names, label_names, number_labels, read_file

_TRIED = 20  # files of a list that are looked for at the start


class ListSource:
    """A text file that names an image per line, with a label or without.

    Paths are relative to the file's folder, or absolute. A label follows a tab (any name), or a space (a whole number,
    on every line, as in DALI's file lists). Empty lines and lines that begin with # are skipped, and so are blanks at
    the end of a line and the mark that Windows puts at the beginning of UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
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
        self.labels, self.class_names = None, []
        if labels:
            numbers = all(label.isdigit() for label in labels)
            self.labels, self.class_names = (number_labels if numbers else label_names)(labels)
        self._names = Names(names)
        self._folder = os.fsencode(path.parent)
        tried = [self.name(image) for image in range(min(len(names), _TRIED))]
        if not any(os.path.lexists(name) for name in tried):
            raise DataError(
                f"{path}: none of its first {len(tried)} files exists, such as {tried[0]!r}. Paths are relative to the "
                f"list's folder; a label follows a tab, or, if all are whole numbers, a space"
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, image: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self._names[image]))

    def read(self, image: int) -> bytes:
        return read_file(os.path.join(self._folder, self._names[image]))


def _split_labels(lines: list[bytes], path: Path) -> tuple[list[bytes], list[bytes]]:
    """(paths, labels), no labels where the lines have none."""
    parts = [line.split(b"\t") for line in lines]
    if all(len(part) == 1 for part in parts):
        parts = [line.rsplit(b" ", 1) for line in lines]
        numbered = [len(part) == 2 and part[1].isdigit() for part in parts]
        if not all(numbered):
            images = [part[0].lower().endswith(IMAGE_EXTENSIONS_BYTES) for part in parts]
            if not any(number and image for number, image in zip(numbered, images, strict=True)):
                return lines, []
            parts = [part if number else [] for part, number in zip(parts, numbered, strict=True)]
    for line, part in zip(lines, parts, strict=True):
        if len(part) != 2 or not part[0] or not part[1]:
            raise DataError(
                f"{path}: some lines have a label after a tab, or a number after a space, but this one is not a path "
                f"and a label: {os.fsdecode(line)!r}"
            )
    return [part[0] for part in parts], [part[1] for part in parts]
