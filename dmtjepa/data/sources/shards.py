"""Images in tar files, in the layout of webdataset: the files of a sample share a name and differ in extension.

The image is the member with an image extension: where a sample has one with a plain extension (`jpg`), what is beside
it (`seg.png`) is not read. The label is the whole number in the member with the extension `cls`; where there is none,
the first folder in the members' names is the class. Images are read in any order by their place in the tar file. An
index beside a shard (`<shard>.idx`, DALI's wds2idx format) saves reading its headers at start; without one, the headers
are read, and an index is kept in the cache folder.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmtjepa.data.sources.base import IMAGE_EXTENSIONS, DataError, Names, label_names, number_labels
from dmtjepa.data.sources.tar_index import Member, list_members

_MAX_OPEN = 64  # shards held open at a time
_COMPRESSED = (".tar.gz", ".tgz")
_LABEL_BYTES = 32
_EXTENSIONS = frozenset(extension[1:].encode() for extension in IMAGE_EXTENSIONS)


class Folder(NamedTuple):
    """What lies in a folder, hidden files apart: tar files, compressed ones, and whether images or folders do, too."""

    shards: list[str]
    compressed: list[str]
    others: bool


def look_into(folder: str) -> Folder:
    shards, compressed, others = [], [], False
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
    """Whether a path names tar shards: one, a pattern of several, or a folder of them."""
    if os.path.isdir(path):
        shards, compressed, others = look_into(path)
        return bool(shards) or (bool(compressed) and not others)
    return path.endswith((".tar", *_COMPRESSED)) or (".tar" in path and re.search(r"[*?{\[]", path) is not None)


def find_shards(path: str) -> list[str]:
    """The shards that a path names, sorted: a tar file, a folder of them, or a pattern (* ? [..] {000..127} {a,b})."""
    if os.path.isdir(path):
        shards, compressed, others = look_into(path)
        if others:
            raise DataError(
                f"{path} holds tar files, and images or folders too: name the shards as {path}/*.tar, or move what is "
                f"not to be read to another folder"
            )
        shards = shards or compressed
    else:
        shards = [
            shard for pattern in _expand(path) for shard in (glob.glob(pattern) if _is_glob(pattern) else [pattern])
        ]
    if not shards:
        raise DataError(f"no tar file matches {path}")
    for shard in shards:
        if not os.path.isfile(shard):
            raise DataError(f"the shard {shard} does not exist")
        if not shard.endswith(".tar"):
            raise DataError(f"{shard} is compressed; shards are read at random places: unpack it to a plain .tar first")
    return sorted(shards)


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def _expand(pattern: str) -> list[str]:
    """{000..012} and {a,b} in a pattern, as in a shell."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[1] is not None:
        width = len(match[1])
        parts = [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    else:
        parts = match[3].split(",")
    return [whole for part in parts for whole in _expand(pattern[: match.start()] + part + pattern[match.end() :])]


class ShardImages(NamedTuple):
    """The images of a shard: places [num_images, 3] int64 (offset, size, offset of the label or -1), and names."""

    place: np.ndarray
    keys: Names


def _list_images(shard: str) -> ShardImages:
    images: defaultdict[tuple[bytes, int], list[Member]] = defaultdict(list)  # by sample
    labels: dict[tuple[bytes, int], int] = {}
    seen: Counter[tuple[bytes, bytes]] = Counter()
    for member in list_members(shard):
        if member.key.endswith(b"/") or not member.key:  # a hidden file, such as those that macOS puts beside others
            continue
        # A name and extension that come again begin another sample of the name.
        sample = member.key, seen[member.key, member.extension]
        seen[member.key, member.extension] += 1
        if member.extension == b"cls":
            labels[sample] = member.offset
        elif member.extension.lower().rpartition(b".")[2] in _EXTENSIONS:
            images[sample].append(member)
    place, names = [], []
    for sample, group in images.items():
        # Names of files can have dots: of a.1.jpg and a.2.jpg none is the plain one, and both are images.
        for image in [member for member in group if b"." not in member.extension][:1] or group:
            place.append((image.offset, image.size, labels.get(sample, -1)))
            names.append(image.key + b"." + image.extension)
    return ShardImages(np.array(place, np.int64).reshape(-1, 3), Names(names))


class ShardSource:
    """The images of tar shards, shard after shard."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shards = find_shards(os.fspath(path))
        with ThreadPoolExecutor(8) as pool:
            listed = list(pool.map(_list_images, self._shards))
        if not any(len(images.keys) for images in listed):
            raise DataError(
                f"no images in {len(self._shards)} shards of {path}; members with these extensions are looked for: "
                f"{' '.join(IMAGE_EXTENSIONS)}"
            )
        self._shard = np.repeat(np.arange(len(listed), dtype=np.int32), [len(images.keys) for images in listed])
        self._place = np.concatenate([images.place for images in listed])
        self._keys = Names.join([images.keys for images in listed])
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def name(self, image: int) -> str:
        return f"{self._shards[self._shard[image]]}:{os.fsdecode(self._keys[image])}"

    def read(self, image: int) -> bytes:
        return self._pread(int(self._shard[image]), *self._place[image, :2].tolist())

    @cached_property
    def _labelled(self) -> tuple[np.ndarray | None, list[str]]:
        """Read when first asked for: training needs no labels, and they lie all over the shards."""
        label_offset = self._place[:, 2]
        if (label_offset >= 0).all():
            texts = [
                self._pread(int(shard), int(offset), _LABEL_BYTES)
                for shard, offset in zip(self._shard, label_offset, strict=True)
            ]
            matches = [re.match(rb"\s*(\d+)", text) for text in texts]
            if all(matches):
                labels, numbers = number_labels([match[1] for match in matches])
                return labels, self._name_classes(numbers)
        keys = [self._keys[image] for image in range(len(self))]
        return label_names([key.split(b"/", 1)[0] for key in keys]) if all(b"/" in key for key in keys) else (None, [])

    def _name_classes(self, numbers: list[str]) -> list[str]:
        """From classes.txt beside the shards, where pack.py puts it, else the numbers."""
        path = Path(self._shards[0]).parent / "classes.txt"
        names = os.fsdecode(path.read_bytes()).split("\n")[:-1] if path.is_file() else []
        return names if len(names) >= len(numbers) else numbers

    @property
    def labels(self) -> np.ndarray | None:
        return self._labelled[0]

    @property
    def class_names(self) -> list[str]:
        return self._labelled[1]

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Thread-safe, and of no file position: worker processes may share the descriptor."""
        with self._lock:
            descriptor = self._open.pop(shard, None)
            if descriptor is None:
                descriptor = os.open(self._shards[shard], os.O_RDONLY)
            self._open[shard] = descriptor
            if len(self._open) > _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.dup(descriptor)  # another thread may close the original meanwhile
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
