"""A folder of images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from dmtjepa.data.sources.base import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    IMAGE_EXTENSIONS_BYTES,
    LIST_EXTENSIONS,
    DataError,
    Names,
    describe_classes,
    file_size,
    label_names,
    read_file,
)

logger = logging.getLogger(__name__)

# Names of the folder to train on, in lower case, of the other splits, and of folders that are never classes.
_TRAIN_NAMES = ("train", "training")
_OTHER_SPLITS = {"val", "valid", "validation", "test", "testing", "dev", "eval"}
_NOT_CLASSES = {"annotations", "devkit", "labels", "lost+found", "masks", "unlabeled", "unlabelled"}


def list_images(folder: Path, extensions: tuple[bytes, ...] = IMAGE_EXTENSIONS_BYTES) -> list[bytes]:
    """The paths of all files with these extensions below a folder, relative to it, sorted by their bytes.

    Links are followed, but each folder is listed once: under its own path if it is below `folder`, otherwise under the
    first of the links to it.
    """
    names: list[bytes] = []
    visited: set[tuple[int, int]] = set()
    links = [(os.fsencode(folder), b"")]
    num_repeated = 0
    while links:  # first the folder itself, then what the links in it lead to, and so on
        found: list[tuple[bytes, bytes]] = []
        for link in links:
            num_repeated += _walk(link, extensions, visited, names, found)
        links = sorted(found)
    if num_repeated:
        logger.warning("%s: %d links to folders that are listed already are ignored", folder, num_repeated)
    return sorted(names)


def _walk(
    root: tuple[bytes, bytes],
    extensions: tuple[bytes, ...],
    visited: set[tuple[int, int]],
    names: list[bytes],
    links: list[tuple[bytes, bytes]],
) -> int:
    """Add the images below a folder to `names`, and the links to folders below it to `links`.

    Folders are given as (path, prefix of the names of their images). Returns how many were visited before.
    """
    folders, num_repeated = [root], 0
    while folders:
        folder, prefix = folders.pop()
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            num_repeated += 1
            continue
        visited.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                link_target_gone = entry.is_symlink() and not os.path.exists(entry.path)
                if not link_target_gone and entry.is_dir():
                    (links if entry.is_symlink() else folders).append((entry.path, prefix + entry.name + b"/"))
                # A dangling link is reported as corrupt later. Pipes and devices are left out.
                elif entry.name.lower().endswith(extensions) and (link_target_gone or entry.is_file()):
                    names.append(prefix + entry.name)
    return num_repeated


def find_images(path: Path) -> Path:
    """The folder to read for `path`: its training split if it is a root of splits, otherwise itself.

    It is a root of splits if one of its folders is named as a training split, and another as a validation or test split
    or all others as something that is not a class. So `train` can be a class, of vehicles.
    """
    if not path.is_dir():
        return path
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    if not any(name.lower() in _TRAIN_NAMES for name in names):
        return path
    folders = [name for name in names if os.path.isdir(path / name)]
    for name in sorted(folders, key=lambda name: (name not in _TRAIN_NAMES, name)):
        others = {other.lower() for other in folders} - {name.lower()}
        if name.lower() in _TRAIN_NAMES and (others & _OTHER_SPLITS or others <= _NOT_CLASSES):
            return path / name
    return path


class FolderSource:
    """A folder of images at any depth. Its first-level folders are the classes, if every image is in one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.exists():
            raise DataError(
                f"the image folder {path} does not exist (in settings, data.root_path and data.image_folder together "
                "name it)"
            )
        if not path.is_dir():
            raise DataError(
                f"{path} is not a folder of images, nor a file list ({', '.join(LIST_EXTENSIONS)}), nor a tar file; "
                f"set data.root_path and data.image_folder to one"
            )
        self.folder = find_images(path)
        try:
            names = list_images(self.folder) or list_images(self.folder, (ARRAY_EXTENSION.encode(),))
        except OSError as error:
            raise DataError(f"cannot list the images of {self.folder}: {error}") from error
        if not names:
            raise DataError(
                f"no images below {self.folder}; files with these extensions, in any case, are looked for: "
                f"{' '.join(IMAGE_EXTENSIONS)}, or else {ARRAY_EXTENSION}"
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

    def describe(self) -> str:
        return f"{len(self)} images{describe_classes(self.class_names)} below {self.folder}"

    def keys(self) -> Names:
        return self._names

    def size(self, image: int) -> int:
        return file_size(self._prefix + self._names[image])

    def read(self, image: int) -> bytes:
        return read_file(self._prefix + self._names[image])
