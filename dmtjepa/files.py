"""Replacing files: a reader, or the next start after a crash, finds the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

WRITING = ".writing-"
"""First part of the name under which a file is written until it is complete."""


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str], mode: str = "wb", newline: str | None = None) -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends, and is removed when the block raises.

    The file is written beside `path`, flushed to disk and renamed. Its permissions follow the umask. Several processes
    may replace the same file at the same time: the last one wins.

    Args:
        mode: `wb` or `w` (UTF-8).
        newline: as for `open`.
    """
    path = Path(path)
    # Without mode 0600, which the tempfile module gives to its files.
    writing = path.with_name(f"{WRITING}{path.name}-{secrets.token_hex(4)}")
    try:
        with writing.open(mode, encoding=None if "b" in mode else "utf-8", newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or created. Changes nothing. Raises OSError."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write into {there}")


def write_atomically(path: str | os.PathLike[str], contents: str | bytes) -> None:
    """Replace the contents of a file; see `open_atomically`."""
    with open_atomically(path, "wb" if isinstance(contents, bytes) else "w") as file:
        file.write(contents)


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Replace a file by `values` as JSON; see `open_atomically`."""
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def publish(writing: Path, path: Path) -> None:
    """Replace `path` by the complete file `writing` on the same file system, which is flushed to disk and renamed."""
    with writing.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(writing, path)
    sync_folder(path.parent)


def link_or_copy(source: Path, path: Path) -> None:
    """Replace `path` by another name of the file `source`, or by a copy if the file system has no links."""
    writing = path.with_name(f"{WRITING}{path.name}-{secrets.token_hex(4)}")
    try:
        try:
            os.link(source, writing)
        except OSError:
            shutil.copyfile(source, writing)
            with writing.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renamed and new files within `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this
            raise
    finally:
        os.close(descriptor)
