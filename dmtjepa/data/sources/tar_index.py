"""The files in a tar shard and the offsets of their data: read from its headers, or from an index file.

An index beside a shard (`<shard>.idx`, the wds2idx format of DALI) saves reading the headers at the start. Without one,
the headers are read, and an index is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dmtjepa.data.cache import cache_folder
from dmtjepa.data.sources.base import DataError, make_printable
from dmtjepa.files import write_atomically

logger = logging.getLogger(__name__)

_INDEX_VERSION = "v1.2"
_BLOCK = 512  # of a tar file
_MAX_LINKS = 40  # that are followed from one member


class Member(NamedTuple):
    """A file in a shard: extension without the dot, offset and size of its data in bytes, name without extension."""

    extension: bytes
    offset: int
    size: int
    key: bytes


def read_members(shard: str) -> list[Member]:
    """The files in a shard, in order, from its headers alone.

    Hard and symbolic links to files of the shard are such files, too. Concatenated archives are read one after the
    other. What is left out is counted and named in the log.
    """
    return _read_headers(shard)[0]


def _read_headers(shard: str) -> tuple[list[Member], list[str]]:
    """The files in a shard, and the names of what is left out: devices, pipes, and links that lead out of the shard."""
    entries: list[tarfile.TarInfo] = []
    try:
        with open(shard, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, 0
            while True:
                end = _read_archive(file, start, size, entries)
                if (size - end) % _BLOCK:
                    raise tarfile.ReadError("ends within a header")
                if size == end:
                    logger.warning(
                        "the shard %s has no end-of-archive mark: some of its last files may be missing", shard
                    )
                    break
                following = _skip_zeros(file, end, size)
                if following == end:
                    raise tarfile.ReadError(f"the header at {end} is damaged")
                if following == size:
                    break
                start = following
                if not _is_header(file, start):
                    logger.warning("%s: %d bytes after the end-of-archive mark are ignored", shard, size - start)
                    break
    except tarfile.TarError as error:
        raise DataError(f"the shard {shard} is not a complete tar file: {error}; create or copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    members, left_out = _resolve_links(entries)
    if left_out:
        logger.warning(
            "the shard %s: %d members are left out, as links to nothing in it or as special files: %s",
            shard, len(left_out), make_printable(", ".join(left_out[:5])),
        )  # fmt: skip
    return members, left_out


def _read_archive(file: BinaryIO, start: int, size: int, entries: list[tarfile.TarInfo]) -> int:
    """Add the headers of the archive that starts at `start` to `entries`. Returns where it ends."""
    file.seek(start)
    end = start
    with tarfile.open(fileobj=file, mode="r:", errorlevel=1, encoding="utf-8", errors="surrogateescape") as archive:
        for info in archive:
            if info.isfile() and info.offset_data + info.size > size:
                raise tarfile.ReadError(f"ends within {info.name}")
            entries.append(info)
            end = archive.offset
    return end


def _skip_zeros(file: BinaryIO, position: int, size: int) -> int:
    """The position of the first block from `position` on that is not zero; `size` if there is none."""
    file.seek(position)
    while chunk := file.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            return position + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        position += len(chunk)
    return size


def _is_header(file: BinaryIO, position: int) -> bool:
    return _parse_header(file, position) is not None


def _parse_header(file: BinaryIO, position: int) -> tarfile.TarInfo | None:
    file.seek(position)
    try:
        return tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None


def _resolve_links(entries: list[tarfile.TarInfo]) -> tuple[list[Member], list[str]]:
    """The members of entries, with the data of their targets for links, and the names of what is left out."""
    table = {posixpath.normpath(info.name): info for info in entries if not info.isdir()}
    members, left_out = [], []
    for info in entries:
        found: tarfile.TarInfo | None = info
        for _ in range(_MAX_LINKS):
            if found is None or found.isfile():
                break
            target = found.linkname
            if found.issym():
                target = posixpath.join(posixpath.dirname(found.name), target)
            found = table.get(posixpath.normpath(target)) if found.islnk() or found.issym() else None
        if found is not None and found.isfile():
            name = info.name.encode("utf-8", "surrogateescape")
            members.append(_split_name(name, found.offset_data, found.size))
        elif not info.isdir():
            left_out.append(info.name)
    return members, left_out


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
        if not member.extension:  # neither an image nor a label
            continue
        if not lines or lines[-1][-1].key != member.key:
            lines.append([])
        lines[-1].append(member)
    text = [f"{_INDEX_VERSION} {len(lines)}".encode()]
    for line in lines:
        fields = [
            b"%s %d %d %s" % (_escape(m.extension), m.offset, m.size, _escape(m.key + b"." + m.extension)) for m in line
        ]
        text.append(b" ".join(fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"\n".join(text) + b"\n")


def _escape(name: bytes) -> bytes:
    return re.sub(rb"[\s\\]", lambda match: b"\\x%02x" % match[0][0], name)


def _unescape(name: bytes) -> bytes:
    return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), name)


def read_index(path: Path, shard: str) -> list[Member] | None:
    """The files that an index lists; None, with a note in the log, if it does not describe this shard.

    Raises:
        DataError: the index is a valid one of a longer shard.
    """
    if path.stat().st_mtime < os.path.getmtime(shard):
        cause = "is older than the shard"
    elif (members := _parse_index(path.read_bytes())) is None:
        cause = "is incomplete or in another format"
    else:
        size = os.path.getsize(shard)
        if any(member.offset + member.size > size for member in members):
            raise DataError(
                f"the shard {shard} is shorter than its index {path} says; copy the shard again, or delete the index"
            )
        if _matches_headers(shard, members):
            return members
        cause = "does not match the headers"
    logger.warning("the index %s %s; the headers of %s are read instead", path, cause, shard)
    return None


def _parse_index(data: bytes) -> list[Member] | None:
    """The members in an index of DALI, version 1.1 or 1.2; None if it is anything else."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    version, *count = lines[0].split() if lines else [b""]
    if version not in (b"v1.2", b"v1.1") or count != [b"%d" % (len(lines) - 1)]:
        return None
    width = 4 if version == b"v1.2" else 3
    members = []
    for number, line in enumerate(lines[1:]):
        fields = line.split()
        if len(fields) % width:
            return None
        for place in range(0, len(fields), width):
            extension, offset_text, size_text = fields[place : place + 3]
            if not (offset_text.isdigit() and size_text.isdigit() and len(offset_text + size_text) < 36):
                return None
            offset, size = int(offset_text), int(size_text)
            if offset < _BLOCK or offset % _BLOCK or offset + size >= 1 << 63:
                return None
            if width == 4:
                members.append(_split_name(_unescape(fields[place + 3]), offset, size))
            else:
                members.append(Member(_unescape(extension), offset, size, b"%08d" % number))
    return members


def _matches_headers(shard: str, members: list[Member]) -> bool:
    """Whether the headers of the first and the last member have the sizes that an index says."""
    with open(shard, "rb") as file:
        for member in members[:1] + members[-1:]:
            info = _parse_header(file, member.offset - _BLOCK)
            if info is None or info.size != member.size:
                return False
    return True


def list_members(shard: str) -> list[Member]:
    """The files in a shard: from its index if there is one, otherwise from its headers."""
    beside = Path(shard + ".idx") if os.path.exists(shard + ".idx") else Path(shard).with_suffix(".idx")
    status = os.stat(shard)
    identity = f"{os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    cached = cache_folder() / "indexes" / f"{hashlib.sha256(identity.encode(errors='replace')).hexdigest()[:24]}.idx"
    for index in (beside, cached):
        if index.is_file() and (members := read_index(index, shard)) is not None:
            return members
    members, left_out = _read_headers(shard)
    if left_out:
        return members  # without an index, so that each start names what is left out
    try:
        write_index(cached, members)
    except OSError as error:  # a full or read-only disk: the next start reads the headers again
        logger.info("the index of %s is not kept: %s", shard, error)
    return members
