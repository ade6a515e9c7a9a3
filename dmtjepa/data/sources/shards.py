"""Images in tar files, in the layout of webdataset: the files of a sample share a name and differ in extension.

The image is the member with an image extension. If a sample has a member with a plain extension (`jpg`), those with
longer ones (`seg.png`) are not read. The label is the whole number in the member with the extension `cls`. Without one,
the first folder in the names of the members is the class. Images are read in any order by their offsets in the tar
file, which tar_index.py finds.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import resource
import threading
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmtjepa.data.sources.base import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    DataError,
    LazyLabels,
    Names,
    label_names,
    make_printable,
    number_labels,
)
from dmtjepa.data.sources.tar_index import Member, list_members

logger = logging.getLogger(__name__)

_MAX_OPEN = 64  # shards held open at a time
_COMPRESSED = (".tar.gz", ".tgz")
_LABEL_BYTES = 32
_TAR_EXTENSIONS = (b"tar", b"tar.gz", b"tgz")
_EXTENSIONS = frozenset(extension[1:].encode() for extension in IMAGE_EXTENSIONS)


class Folder(NamedTuple):
    """The contents of a folder without hidden files: tar files, compressed ones, and whether there are others."""

    shards: list[str]
    compressed: list[str]
    has_images_or_folders: bool


def _list_folder(folder: str) -> Folder:
    shards: list[str] = []
    compressed: list[str] = []
    others = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith((".tar", *_COMPRESSED)) and entry.is_file():
                (shards if entry.name.endswith(".tar") else compressed).append(entry.path)
            elif not others:
                others = entry.name.lower().endswith(IMAGE_EXTENSIONS) or entry.is_dir()
    return Folder(shards, compressed, others)


def is_shards(path: str) -> bool:
    """Whether a path names tar shards: one, a pattern, or a folder of them."""
    if os.path.isdir(path):
        shards, compressed, others = _list_folder(path)
        return bool(shards) or (bool(compressed) and not others)
    return path.endswith((".tar", *_COMPRESSED)) or (".tar" in path and re.search(r"[*?{\[]", path) is not None)


def _refuse_weights(path: str, shards: list[str]) -> None:
    """Files of PyTorch can have names like those of shards. Raises DataError."""
    weights = [shard for shard in shards if shard.endswith(".pth.tar")]
    if weights:
        raise DataError(f"{weights[0]} holds weights, not images; name images in place of {path}")


def find_shards(path: str) -> list[str]:
    """The shards at a path, sorted: a tar file, a folder of them, or a pattern (* ? [..] {000..127} {a,b})."""
    if os.path.isdir(path):
        shards, compressed, others = _list_folder(path)
        _refuse_weights(path, shards)
        if others:
            raise DataError(
                f"{path} contains tar files, and images or folders too: name the shards as {path}/*.tar, or move the "
                f"other files to another folder"
            )
        shards = shards or compressed
    else:
        shards = [
            shard for pattern in _expand(path) for shard in (glob.glob(pattern) if _is_glob(pattern) else [pattern])
        ]
    if not shards:
        raise DataError(f"no tar file matches {path}")
    _refuse_weights(path, shards)
    for shard in shards:
        if not os.path.isfile(shard):
            raise DataError(f"the shard {shard} does not exist")
        if not shard.endswith(".tar"):
            raise DataError(
                f"{shard} is compressed, and shards are read in random order: decompress it to a plain .tar first"
            )
    return sorted(shards)


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def _expand(pattern: str) -> list[str]:
    """Expand {000..012} and {a,b} in a pattern, like a shell."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[1] is not None:
        width = len(match[1])
        choices = [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    else:
        choices = match[3].split(",")
    return [
        whole for choice in choices for whole in _expand(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _max_open() -> int:
    """Shards that may be held open at a time: at most a quarter of the files that this process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, limit // 4))


class ShardImages(NamedTuple):
    """The images of a shard: places [num_images, 3] int64 (offset, size, offset of the label or -1), and names."""

    place: np.ndarray
    keys: Names
    tar_files: list[str]  # names of members that are tar files


def _list_images(shard: str) -> ShardImages:
    images: defaultdict[tuple[bytes, int], list[Member]] = defaultdict(list)  # by sample
    arrays: dict[tuple[bytes, int], list[Member]] = {}
    labels: dict[tuple[bytes, int], int] = {}
    tar_files: list[str] = []
    seen: Counter[tuple[bytes, bytes]] = Counter()
    for member in list_members(shard):
        if member.key.endswith(b"/") or not member.key:  # a hidden file, such as those of macOS
            continue
        # A name and extension that appear again start another sample of that name.
        sample = member.key, seen[member.key, member.extension]
        seen[member.key, member.extension] += 1
        if member.extension == b"cls":
            labels[sample] = member.offset
        elif member.extension.lower().rpartition(b".")[2] in _EXTENSIONS:
            images[sample].append(member)
        elif member.extension == ARRAY_EXTENSION[1:].encode():
            arrays[sample] = [member]
        elif member.extension.lower().endswith(_TAR_EXTENSIONS):
            tar_files.append(os.fsdecode(member.key + b"." + member.extension))
    place, names = [], []
    for sample, group in (images or arrays).items():
        # File names can contain dots: neither a.1.jpg nor a.2.jpg has a plain extension, and both are images.
        for image in [member for member in group if b"." not in member.extension][:1] or group:
            place.append((image.offset, image.size, labels.get(sample, -1)))
            names.append(image.key + b"." + image.extension)
    return ShardImages(np.array(place, np.int64).reshape(-1, 3), Names(names), tar_files)


class ShardSource(LazyLabels):
    """The images of tar shards, in the order of the shards."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shards = find_shards(os.fspath(path))
        with ThreadPoolExecutor(8) as pool:
            listed = list(pool.map(_list_images, self._shards))
        tar_files = [name for images in listed for name in images.tar_files]
        nested = (
            f"{len(tar_files)} members are tar files themselves, such as {tar_files[0]}: unpack the outer tar, and "
            f"name those in it as the shards"
            if tar_files
            else ""
        )
        if not any(len(images.keys) for images in listed):
            raise DataError(
                f"no images in {len(self._shards)} shards of {path}. "
                + (nested or f"Members with these extensions are images: {' '.join(IMAGE_EXTENSIONS)}")
            )
        if nested:
            logger.warning("%s: %s", path, make_printable(nested))
        self._shard = np.repeat(np.arange(len(listed), dtype=np.int32), [len(images.keys) for images in listed])
        self._place = np.concatenate([images.place for images in listed])
        self._keys = Names.join([images.keys for images in listed])
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def name(self, image: int) -> str:
        return f"{self._shards[self._shard[image]]}:{os.fsdecode(self._keys[image])}"

    def describe(self) -> str:
        """Without classes: they would have to be read from all over the shards."""
        return f"{len(self)} images in {len(self._shards)} tar shards, the first of which is {self._shards[0]}"

    def keys(self) -> Names:
        return self._keys

    def size(self, image: int) -> int:
        return int(self._place[image, 1])

    def read(self, image: int) -> bytes:
        return self._pread(int(self._shard[image]), *self._place[image, :2].tolist())

    def _read_labels(self) -> tuple[np.ndarray | None, list[str]]:
        """Those of the `.cls` members, which are all over the shards, or of the folders in the names."""
        label_offset = self._place[:, 2]
        if (label_offset >= 0).all():
            texts = [
                self._pread(int(shard), int(offset), _LABEL_BYTES)
                for shard, offset in zip(self._shard, label_offset, strict=True)
            ]
            matches = [re.match(rb"\s*(\d+)", text) for text in texts]
            if all(matches):
                labels, numbers = number_labels([match[1] for match in matches if match])
                return labels, self._name_classes(numbers)
        keys = [self._keys[image] for image in range(len(self))]
        return label_names([key.split(b"/", 1)[0] for key in keys]) if all(b"/" in key for key in keys) else (None, [])

    def _name_classes(self, numbers: list[str]) -> list[str]:
        """The names in classes.txt, which make_shards.py writes beside the shards; without it, the numbers."""
        path = Path(self._shards[0]).parent / "classes.txt"
        names = os.fsdecode(path.read_bytes()).split("\n")[:-1] if path.is_file() else []
        return names if len(names) >= len(numbers) else numbers

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Read without a file position: threads and worker processes share the descriptors."""
        with self._lock:
            descriptor = self._open.pop(shard, None)
            if descriptor is None:
                descriptor = os.open(self._shards[shard], os.O_RDONLY)
            self._open[shard] = descriptor
            if len(self._open) > _max_open():
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.dup(descriptor)  # another thread may close the original
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
