"""Writes images into tar shards: `dmtjepa shards SOURCE OUT --shard-size 5000`.

The shards have the layout of webdataset, and an index each. A shard is written to a temporary file that is renamed when
it is complete, and existing shards are kept. So an interrupted call continues when it is started again. Images are
copied without decoding.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dmtjepa.data import DataError, ImageSource
from dmtjepa.data.decode import read_kind, tell_reason
from dmtjepa.data.sources.base import ARRAY_EXTENSION, IMAGE_EXTENSIONS
from dmtjepa.data.sources.tar_index import read_members, write_index
from dmtjepa.files import WRITING, open_atomically, write_atomically, write_json


def make_shards(source: ImageSource, out: Path, shard_size: int, num_threads: int = 8) -> list[tuple[str, str]]:
    """Write the shards of a source that do not exist yet. Returns (name, reason) of the images that cannot be read.

    Raises:
        DataError: the folder contains shards of other images or another size, or a shard cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(f"{WRITING}*"):  # of an interrupted call
        leftover.unlink(missing_ok=True)
    _check_or_write_note(source, out, shard_size)
    if source.labels is not None:
        lines = "".join(name.replace("\n", " ") + "\n" for name in source.class_names)
        write_atomically(out / "classes.txt", os.fsencode(lines))
    starts = range(0, len(source), shard_size)
    unreadable: list[tuple[str, str]] = []
    with ThreadPoolExecutor(num_threads) as pool, tqdm(total=len(source), unit=" images", disable=None) as bar:
        lock = threading.Lock()

        def advance(num_images: int) -> None:
            with lock:
                bar.update(num_images)

        def write(start: int) -> None:
            stop = min(start + shard_size, len(source))
            path = out / f"shard-{start // shard_size:06d}.tar"
            if path.exists() and path.with_suffix(".idx").exists():
                advance(stop - start)
            else:
                unreadable.extend(_write_shard(source, path, range(start, stop), advance))

        try:
            list(pool.map(write, starts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return unreadable


def _check_or_write_note(source: ImageSource, out: Path, shard_size: int) -> None:
    """Write a note of the images in this folder, or compare with the existing note."""
    names = hashlib.sha256()
    for image in range(len(source)):
        names.update(os.fsencode(source.name(image)) + b"\n")
    note = {"num_images": len(source), "shard_size": shard_size, "names": names.hexdigest()}
    path = out / "pack.json"
    if path.exists() and json.loads(path.read_text()) != note:
        raise DataError(f"{out} contains shards of other images or of another size; write to another folder")
    write_json(path, note)


def _write_shard(
    source: ImageSource, path: Path, images: range, advance: Callable[[int], None]
) -> list[tuple[str, str]]:
    unreadable = []
    try:
        with open_atomically(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for image in images:
                advance(1)
                try:
                    data = source.read(image)
                except OSError as error:
                    unreadable.append((source.name(image), tell_reason(error)))
                    continue
                name = _name_member(source, image, data)
                _add(archive, name, data)
                if source.labels is not None:
                    _add(archive, name.rpartition(".")[0] + ".cls", b"%d" % source.labels[image])
        write_index(path.with_suffix(".idx"), read_members(str(path)))
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}. Complete shards are kept: free some space, and start again "
            f"to continue"
        ) from error
    return unreadable


def _name_member(source: ImageSource, image: int, data: bytes) -> str:
    """<class>/<number>-<file name without dots>.<extension>: shows the original name, and unpacks as a folder."""
    stem, extension = os.path.splitext(os.path.basename(source.name(image)))
    extension = (
        extension.lower() if extension.lower() in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION) else _guess_extension(data)
    )
    folder = f"{source.class_names[source.labels[image]]}/" if source.labels is not None else ""
    stem = re.sub(r"[^\w-]", "_", stem)
    return f"{folder}{image:09d}-{stem}{extension}"


def _guess_extension(data: bytes) -> str:
    """The extension of an image whose name has none; `.jpg` if its bytes do not tell."""
    try:
        extension = f".{read_kind(data)[0].lower()}"
    except (OSError, ValueError):
        return ".jpg"
    return extension if extension in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION) else ".jpg"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":  # a command of version 0.1.0: a script that calls it must not believe that it did its work
    raise SystemExit("`python -m dmtjepa.data.make_shards` is now `dmtjepa shards SOURCE OUT`, with the same options")
