"""A folder of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmtjepa.data.sources.base import (
    IMAGE_EXTENSIONS,
    IMAGE_EXTENSIONS_BYTES,
    LIST_EXTENSIONS,
    DataError,
    Names,
    label_names,
    read_file,
)

# The official configurations name the folder above `train`; a folder of splits alone is entered.
_SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def list_images(folder: Path) -> list[bytes]:
    """The paths of all image files below a folder, relative to it, sorted by their bytes. Links are followed."""
    return sorted(_walk(os.fsencode(folder), b"", frozenset()))


def _walk(folder: bytes, prefix: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    above = above | {identity}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            link_target_gone = entry.is_symlink() and not os.path.exists(entry.path)
            if not link_target_gone and entry.is_dir():
                yield from _walk(entry.path, prefix + entry.name + b"/", above)
            # A dangling link is reported as corrupt later. A pipe is left out.
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS_BYTES) and (link_target_gone or entry.is_file()):
                yield prefix + entry.name


def find_images(path: Path) -> Path:
    """The folder to read for `path`: its `train` folder if it contains only splits, otherwise itself."""
    if (path / "train").is_dir():
        folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}
        if folders <= _SPLIT_NAMES:
            return path / "train"
    return path


class FolderSource:
    """A folder of images at any depth. Its first-level folders are the classes, if every image is in one."""

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
