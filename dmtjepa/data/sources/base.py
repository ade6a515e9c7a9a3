"""What all sources of images share: the protocol, names, labels, and the error for images that cannot be used."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from dmtjepa.errors import UserError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
IMAGE_EXTENSIONS_BYTES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
LIST_EXTENSIONS = (".txt", ".tsv", ".lst")
_MAX_CLASSES = 1_000_000  # larger numbers are names (ImageNet's 1440764), not places in a list of classes


class DataError(UserError, RuntimeError):
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
