"""What a run was trained on, so that a resumed run notices other images."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmtjepa.data.sources.base import ImageSource, Names, make_printable
from dmtjepa.files import open_atomically

_MAX_SIZES = 4096  # images whose size is looked up
_NUM_NAMED = 3  # images that a message names


@dataclass(frozen=True)
class Fingerprint:
    """The images of a run, as digests, and the loader, whose crops and pixels differ from those of another one."""

    num_images: int
    names: str  # of all names, in their order
    sizes: str  # of the sizes in bytes of at most 4096 images, evenly spaced
    loader: str

    def to_meta(self) -> dict[str, Any]:
        """The values for the meta of a checkpoint."""
        return asdict(self)


class ImageList:
    """The names of all images, and the sizes of some. Names are relative to the folder, list or shard.

    The names are known without reading the images; sizes of files must be asked for one by one, which takes minutes
    for a million images on a network. So at most 4096 images, evenly spaced, are asked for, by 16 threads. Images that
    are added, removed or renamed are always noticed; replaced ones if they are many, or the images few.
    """

    def __init__(self, names: Names, sizes: dict[int, int]) -> None:
        self.names, self.sizes = names, sizes

    @classmethod
    def of(cls, source: ImageSource) -> ImageList:
        """List the images of a source."""
        count = len(source)
        chosen = np.unique(np.linspace(0, count - 1, min(count, _MAX_SIZES)).astype(np.int64)).tolist()
        with ThreadPoolExecutor(16) as pool:
            sizes = list(pool.map(source.size, chosen))
        return cls(source.keys(), dict(zip(chosen, sizes, strict=True)))

    def fingerprint(self, loader: str) -> Fingerprint:
        """The digests of this list."""
        sizes = hashlib.sha256(repr(sorted(self.sizes.items())).encode()).hexdigest()
        return Fingerprint(len(self.names), self.names.digest(), sizes, loader)

    def write(self, path: Path) -> None:
        """Write the list as gzip: per image its size, if known, a tab, its name and a zero byte."""
        with open_atomically(path) as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file:
            for image, name in enumerate(self.names):
                file.write(f"{self.sizes.get(image, '')}\t".encode() + name + b"\0")

    @classmethod
    def read(cls, path: Path) -> ImageList | None:
        """Read what `write` has written; None if that is not possible."""
        try:
            rows = [row.split(b"\t", 1) for row in gzip.decompress(path.read_bytes()).split(b"\0")[:-1]]
            sizes = {image: int(size) for image, (size, _) in enumerate(rows) if size}
            return cls(Names([name for _, name in rows]), sizes)
        except (OSError, EOFError, ValueError):
            return None


def describe_change(earlier: ImageList, now: ImageList) -> str:
    """How the images differ, with counts and some names, e.g. `2 added (a.png, b.png), 1 removed (c.png)`."""
    old, new = list(earlier.names), list(now.names)
    before, after = set(old), set(new)
    sizes = {old[image]: size for image, size in earlier.sizes.items()}
    replaced = [new[image] for image, size in now.sizes.items() if sizes.get(new[image], size) != size]
    groups = {
        "added": [name for name in new if name not in before],
        "removed": [name for name in old if name not in after],
        "of another size": replaced,
    }
    parts = [f"{len(names)} {what} ({_name_some(names)})" for what, names in groups.items() if names]
    if parts:
        return ", ".join(parts)
    pairs = enumerate(zip(old, new, strict=False))
    first = next((image for image, (one, other) in pairs if one != other), min(len(old), len(new)))
    return f"the same names in another order, from image {first} on"


def _name_some(names: Sequence[bytes]) -> str:
    text = ", ".join(os.fsdecode(name) for name in names[:_NUM_NAMED])
    return make_printable(text) + (", ..." if len(names) > _NUM_NAMED else "")
