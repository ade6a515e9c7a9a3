"""File lists, with labels and without, and what can be wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dmtjepa.data import DataError, build_eval_loader, check, open_images
from dmtjepa.data.sources.file_list import ListSource
from dmtjepa.data.sources.folder import FolderSource
from tests.helpers.images import contents


def test_lists(image_folder: Path, tmp_path: Path):
    files = sorted(image_folder.rglob("*.jpg"))
    listing = image_folder / "list.tsv"
    relative = [path.relative_to(image_folder).as_posix() for path in files]
    listing.write_text("# a comment\n\n" + "".join(f"{name}\t{name.split('/')[0]}\r\n" for name in relative))
    source = ListSource(listing)
    assert contents(source) == [path.read_bytes() for path in files]
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels.tolist() == FolderSource(image_folder).labels.tolist()
    batches = list(build_eval_loader(listing, 16, 10))
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == source.labels.tolist()
    listing.write_text("".join(f"{path} {number % 4}\n" for number, path in enumerate(files)))
    source = ListSource(listing)
    assert source.labels.tolist() == [number % 4 for number in range(30)]
    assert source.class_names == ["0", "1", "2", "3"]
    listing.write_text("".join(f"{name}\n" for name in relative))
    assert ListSource(listing).labels is None
    listing.unlink()


def test_wrong_lists(tmp_path: Path):
    listing = tmp_path / "list.txt"
    with pytest.raises(DataError, match="cannot read the list"):
        open_images(listing)
    listing.write_text("# nothing\n")
    with pytest.raises(DataError, match="is empty"):
        open_images(listing)
    for text in ("a.jpg\tcat\nb.jpg\n", "a.jpg 3\nb.jpg\n"):
        listing.write_text(text)
        with pytest.raises(DataError, match=r"not a path and a label: 'b\.jpg'"):
            open_images(listing)
    listing.write_text("a.jpg 3\nb.jpg\n", encoding="utf-16")
    with pytest.raises(DataError, match="save it as UTF-8 text"):
        open_images(listing)
    listing.write_text("images/a.jpg cat\nimages/b.jpg dog\n")
    with pytest.raises(DataError, match=r"none of its first 2 files exists, such as '.*/a\.jpg cat'.*follows a tab"):
        open_images(listing)
    with pytest.raises(DataError, match=r"nor a file list \(\.txt, \.tsv, \.lst\)"):
        open_images(listing.rename(tmp_path / "list.csv"))


def test_lists_as_windows_and_other_tools_write_them(image_folder: Path, tmp_path: Path):
    files = sorted(image_folder.rglob("*.jpg"))
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}  \r\n" for path in files), encoding="utf-8-sig")
    assert contents(open_images(listing)) == [path.read_bytes() for path in files]
    assert open_images(listing).labels is None
    # Numbers that are names of classes, not places in a list of them.
    listing.write_text("".join(f"{path}\t{7_000_000_000 + number % 3}\n" for number, path in enumerate(files)))
    source = open_images(listing)
    assert source.labels.tolist() == [number % 3 for number in range(30)]
    assert source.class_names == ["7000000000", "7000000001", "7000000002"]


def test_pipes_and_devices_in_a_list_are_not_read(image_folder: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text(f"pipe.jpg\n{image_folder / 'ant' / '000.jpg'}\n/dev/zero\n")
    report = check.check(open_images(tmp_path / "list.txt"), num_workers=1)
    assert report.corrupt == [(name, "not a regular file") for name in (str(tmp_path / "pipe.jpg"), "/dev/zero")]
