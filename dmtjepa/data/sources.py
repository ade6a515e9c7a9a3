"""Where images come from: `ImageSource` hands out encoded bytes by number; folders and file lists are here."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
_EXTENSIONS = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
LIST_EXTENSIONS = (".txt", ".tsv", ".lst")
# The released configs name the folder above `train`; a folder that holds nothing but splits is entered.
_SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
_MAX_CLASSES = 1_000_000  # larger numbers are names (ImageNet's 1440764), not places in a list of classes
_TRIED = 20  # files of a list that are looked for at the start


class DataError(RuntimeError):
    """Images that cannot be trained on; the message names them and the remedy."""


class ImageSource(Protocol):
    """Encoded images by number. `labels` is [num_images] int64, or None where images have none."""

    labels: np.ndarray | None
    class_names: list[str]

    def __len__(self) -> int: ...

    def name(self, image: int) -> str:
        """What to call an image in messages."""
        ...

    def read(self, image: int) -> bytes:
        """The encoded bytes; raises OSError where they cannot be read."""
        ...


class Names:
    """Many strings in two arrays, which worker processes share without copying: [i] -> bytes."""

    def __init__(self, names: list[bytes]) -> None:
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(names), dtype=np.uint8)

    @classmethod
    def join(cls, parts: list[Names]) -> Names:
        """All strings of several, one after the other."""
        joined = cls([])
        starts = np.cumsum([0] + [len(part._bytes) for part in parts])
        joined._ends = np.concatenate([part._ends + start for part, start in zip(parts, starts, strict=False)])
        joined._bytes = np.concatenate([part._bytes for part in parts])
        return joined

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes()


def list_images(folder: Path) -> list[bytes]:
    """Paths of all image files below a folder, relative to it, sorted by their bytes. Links are followed."""
    return sorted(_walk(os.fsencode(folder), b"", frozenset()))


def _walk(folder: bytes, prefix: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that it lies in
        return
    above = above | {identity}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            link_target_gone = entry.is_symlink() and not os.path.exists(entry.path)
            if not link_target_gone and entry.is_dir():
                yield from _walk(entry.path, prefix + entry.name + b"/", above)
            # A link to nowhere will be told of as broken; a pipe is left out, as it would be read for ever.
            elif entry.name.lower().endswith(_EXTENSIONS) and (link_target_gone or entry.is_file()):
                yield prefix + entry.name


def find_images(path: Path) -> Path:
    """The folder that is read for `path`: its `train` folder where it holds splits alone, else itself."""
    if (path / "train").is_dir():
        folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}
        if folders <= _SPLIT_NAMES:
            return path / "train"
    return path


def label_names(names: list[bytes]) -> tuple[np.ndarray, list[str]]:
    """([num_images] int64 index into the sorted names, the sorted names) of a name for each image."""
    order = {name: label for label, name in enumerate(sorted(set(names)))}
    labels = np.array([order[name] for name in names], dtype=np.int64)
    return labels, [os.fsdecode(name) for name in order]


def number_labels(numbers: list[bytes]) -> tuple[np.ndarray, list[str]]:
    """As label_names, for whole numbers: they keep their values, unless they are too large for class numbers."""
    values = [int(number) for number in numbers]
    if max(values) >= _MAX_CLASSES:
        return label_names(numbers)
    return np.array(values, dtype=np.int64), [str(label) for label in range(max(values) + 1)]


def read_file(path: bytes) -> bytes:
    """The bytes of a file; of a pipe without a writer, which would be waited for without the flag, none."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        return file.read() or b""


class FolderSource:
    """A folder of images, however deeply nested. Its first-level folders are the classes, when all images have one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.exists():
            raise DataError(
                f"the image folder {path} does not exist; set data.root_path and data.image_folder "
                f"(together they name it)"
            )
        if not path.is_dir():
            raise DataError(
                f"{path} is not a folder of images, nor a file list ({', '.join(LIST_EXTENSIONS)}), nor a tar file; "
                f"set data.root_path and data.image_folder to one"
            )
        self.folder = find_images(path)
        try:
            names = list_images(self.folder)
        except OSError as error:
            raise DataError(f"cannot list the images of {self.folder}: {error}") from error
        if not names:
            raise DataError(
                f"no images below {self.folder}; files with these extensions, in any case, are looked for: "
                f"{' '.join(IMAGE_EXTENSIONS)}"
            )
        self.class_names: list[str] = []
        self.labels: np.ndarray | None = None
        if all(b"/" in name for name in names):
            self.labels, self.class_names = label_names([name.split(b"/", 1)[0] for name in names])
        self._names = Names(names)
        self._prefix = os.fsencode(self.folder) + b"/"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, image: int) -> str:
        return os.fsdecode(self._prefix + self._names[image])

    def read(self, image: int) -> bytes:
        return read_file(self._prefix + self._names[image])


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
            images = [part[0].lower().endswith(_EXTENSIONS) for part in parts]
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
