"""The files in a tar shard and the offsets of their data: read from its headers, or from an index file.

An index beside a shard (`<shard>.idx`, the wds2idx format of DALI) saves reading the headers at the start. Without one,
the headers are read, and an index is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
import threading
from pathlib import Path
from typing import NamedTuple

from dmtjepa.data.cache import cache_folder
from dmtjepa.data.sources.base import DataError

logger = logging.getLogger(__name__)

_INDEX_VERSION = "v1.2"
_BLOCK = 512  # of a tar file


class Member(NamedTuple):
    """A file in a shard: extension without the dot, offset and size of its data in bytes, name without extension."""

    extension: bytes
    offset: int
    size: int
    key: bytes


def read_members(shard: str) -> list[Member]:
    """The files in a shard, in order, from its headers alone."""
    members = []
    try:
        with tarfile.open(shard, "r:", errorlevel=1) as archive:
            size, end = os.path.getsize(shard), 0
            for info in archive:
                if info.isfile():
                    if info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"ends within {info.name}")
                    members.append(_split_name(os.fsencode(info.name), info.offset_data, info.size))
                end = archive.offset
        if (size - end) % _BLOCK:
            raise tarfile.ReadError("ends within a header")
        if size == end:
            logger.warning("the shard %s has no end-of-archive mark: some of its last files may be missing", shard)
    except tarfile.TarError as error:
        raise DataError(f"the shard {shard} is not a complete tar file: {error}; create or copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    return members


def _split_name(name: bytes, offset: int, size: int) -> Member:
    """The rule of webdataset: the extension is all that follows the first dot of the file name, the key the rest."""
    name = name.removeprefix(b"./")
    folder, _, file = name.rpartition(b"/")
    stem, _, extension = file.partition(b".")
    return Member(extension, offset, size, folder + b"/" + stem if folder else stem)


def write_index(path: Path, members: list[Member]) -> None:
    """Write an index in the format of DALI: per sample a line of `extension offset size name` for each file."""
    lines: list[list[Member]] = []
    for member in members:
        if not lines or lines[-1][-1].key != member.key:
            lines.append([])
        lines[-1].append(member)
    text = [f"{_INDEX_VERSION} {len(lines)}".encode()]
    for line in lines:
        fields = [
            b"%s %d %d %s" % (m.extension, m.offset, m.size, (m.key + b"." + m.extension).replace(b" ", b"\\x20"))
            for m in line
        ]
        text.append(b" ".join(fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    part.write_bytes(b"\n".join(text) + b"\n")
    os.replace(part, path)


def read_index(path: Path, shard: str) -> list[Member] | None:
    """The files that an index lists; None if it is older than the shard, incomplete, or in another format."""
    if path.stat().st_mtime < os.path.getmtime(shard):
        return None
    lines = path.read_bytes().splitlines()
    version, *count = lines[0].split() if lines else [b""]
    if version not in (b"v1.2", b"v1.1") or count != [b"%d" % (len(lines) - 1)]:
        return None
    size, width = os.path.getsize(shard), 4 if version == b"v1.2" else 3
    members = []
    for number, line in enumerate(lines[1:]):
        fields = line.split(b" ")
        if len(fields) % width:
            return None
        for place in range(0, len(fields), width):
            extension, offset, length = fields[place], int(fields[place + 1]), int(fields[place + 2])
            key = b"%08d" % number
            if width == 4:
                key = fields[place + 3].replace(b"\\x20", b" ").removeprefix(b"./").removesuffix(b"." + extension)
            if offset + length > size:
                raise DataError(f"the shard {shard} is shorter than its index {path} says; copy it again")
            members.append(Member(extension, offset, length, key))
    return members


def list_members(shard: str) -> list[Member]:
    """The files in a shard: from its index if there is one, otherwise from its headers."""
    beside = Path(shard + ".idx") if os.path.exists(shard + ".idx") else Path(shard).with_suffix(".idx")
    status = os.stat(shard)
    identity = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    cached = cache_folder() / "indexes" / f"{hashlib.sha256(identity.encode(errors='replace')).hexdigest()[:24]}.idx"
    for index in (beside, cached):
        if index.is_file() and (members := read_index(index, shard)) is not None:
            return members
    members = read_members(shard)
    try:
        write_index(cached, members)
    except OSError as error:  # a full or read-only disk: the next start reads the headers again
        logger.info("the index of %s is not kept: %s", shard, error)
    return members
