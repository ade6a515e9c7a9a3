"""Where images come from: `ImageSource` hands out encoded bytes by number; folders are here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif",
)  # fmt: skip
# The released configs name the folder above `train`; a folder that holds nothing but splits is entered.
_SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


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
            if entry.is_dir():
                yield from _walk(entry.path, prefix + entry.name + b"/", above)
            elif entry.name.lower().endswith(tuple(e.encode() for e in IMAGE_EXTENSIONS)):
                yield prefix + entry.name


def find_images(path: Path) -> Path:
    """The folder that is read for `path`: its `train` folder where it holds splits alone, else itself."""
    if (path / "train").is_dir():
        folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}
        if folders <= _SPLIT_NAMES:
            return path / "train"
    return path


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
            raise DataError(f"{path} is not a folder of images; set data.root_path and data.image_folder to one")
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
            classes = [name.split(b"/", 1)[0] for name in names]
            order = {name: label for label, name in enumerate(sorted(set(classes)))}
            self.class_names = [os.fsdecode(name) for name in order]
            self.labels = np.array([order[name] for name in classes], dtype=np.int64)
        self._names = Names(names)
        self._prefix = os.fsencode(self.folder) + b"/"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, image: int) -> str:
        return os.fsdecode(self._prefix + self._names[image])

    def read(self, image: int) -> bytes:
        with open(self._prefix + self._names[image], "rb") as file:
            return file.read()
