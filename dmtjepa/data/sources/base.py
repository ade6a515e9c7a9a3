"""What all sources of images share: the protocol, names, labels, and the error for images that cannot be used."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np

from dmtjepa.errors import UserError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
ARRAY_EXTENSION = ".npy"
"""Of arrays of pixels, which are images where there are no others."""
IMAGE_EXTENSIONS_BYTES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
LIST_EXTENSIONS = (".txt", ".tsv", ".lst")
_MAX_CLASSES = 1_000_000  # larger numbers are names (1440764 of ImageNet), not class indices


class DataError(UserError, RuntimeError):
    """The images cannot be used. The message says why, and what to do.

    Names of files can be any bytes. What cannot be printed of them is escaped in the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(make_printable(message))


def make_printable(text: str) -> str:
    """Escape the bytes of file names that are not UTF-8, which Python keeps as lone surrogates."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # surrogates of another origin
        return text.encode(errors="backslashreplace").decode()


class ImageSource(Protocol):
    """Encoded images by number. `labels` is [num_images] int64, or None if the images have no labels."""

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def name(self, image: int) -> str:
        """The name of an image in messages."""
        ...

    def keys(self) -> Names:
        """The names of all images within their folder, list or shards: the same wherever that is."""
        ...

    def size(self, image: int) -> int:
        """The number of encoded bytes; -1 if that cannot be found out."""
        ...

    def read(self, image: int) -> bytes:
        """The encoded bytes. Raises OSError if they cannot be read."""
        ...


class StoredSource(ImageSource, Protocol):
    """A source that `open_images` opens."""

    def describe(self) -> str:
        """How many images there are, and where they are stored."""
        ...


class LazyLabels(ABC):
    """A source whose labels are read at the first use, because training needs none."""

    @abstractmethod
    def _read_labels(self) -> tuple[np.ndarray | None, list[str]]:
        """Labels, [num_images] int64 or None, and the names of the classes."""

    @cached_property
    def _labelled(self) -> tuple[np.ndarray | None, list[str]]:
        return self._read_labels()

    @property
    def labels(self) -> np.ndarray | None:
        return self._labelled[0]

    @property
    def class_names(self) -> list[str]:
        return self._labelled[1]


class Names:
    """A list of byte strings, stored in two arrays that worker processes share without copying."""

    def __init__(self, names: list[bytes]) -> None:
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(names), dtype=np.uint8)

    @classmethod
    def join(cls, lists: list[Names]) -> Names:
        """The concatenation of several lists."""
        combined = cls([])
        starts = np.cumsum([0] + [len(names._bytes) for names in lists])
        combined._ends = np.concatenate([names._ends + start for names, start in zip(lists, starts, strict=False)])
        combined._bytes = np.concatenate([names._bytes for names in lists])
        return combined

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """SHA-256 of the names in their order."""
        return hashlib.sha256(self._ends.tobytes() + self._bytes.tobytes()).hexdigest()

    def __getitem__(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes()


def label_names(names: list[bytes]) -> tuple[np.ndarray, list[str]]:
    """From the name of the class of each image to ([num_images] int64 labels, the class names, sorted)."""
    order = {name: label for label, name in enumerate(sorted(set(names)))}
    labels = np.array([order[name] for name in names], dtype=np.int64)
    return labels, [os.fsdecode(name) for name in order]


def number_labels(numbers: list[bytes]) -> tuple[np.ndarray, list[str]]:
    """Like `label_names`, for whole numbers: they are the labels, unless they are too large to be class indices."""
    values = [int(number) for number in numbers]
    if max(values) >= _MAX_CLASSES:
        return label_names(numbers)
    return np.array(values, dtype=np.int64), [str(label) for label in range(max(values) + 1)]


def describe_classes(class_names: list[str]) -> str:
    """ " of 3 classes", or nothing if there are no classes."""
    return f" of {len(class_names)} {'class' if len(class_names) == 1 else 'classes'}" if class_names else ""


def file_size(path: bytes) -> int:
    """The size of a file in bytes; -1 if it cannot be found out."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def read_file(path: bytes) -> bytes:
    """The bytes of a regular file. Pipes and devices can be endless: they raise OSError."""
    # Without O_NONBLOCK, opening a pipe that has no writer would block.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read() or b""
