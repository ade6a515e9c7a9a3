"""Listing of folders, and the errors a new user meets."""

from __future__ import annotations

import contextlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, build_loader, open_images
from dmtjepa.data.sources.base import Names
from dmtjepa.data.sources.folder import FolderSource


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")


def test_nested_folders_extensions_and_labels(tmp_path: Path):
    for name in ("b/x.PNG", "b/deep/er/y.JpEg", "a/z.webp", "c/täst é.png", ".hidden/h.png", "a/._z.png"):
        touch(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    names = [source.name(image)[len(str(tmp_path)) + 1 :] for image in range(len(source))]
    assert names == ["a/z.webp", "b/deep/er/y.JpEg", "b/x.PNG", "c/täst é.png"]
    assert source.class_names == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 1, 1, 2]
    assert source.read(3) == (tmp_path / "c" / "täst é.png").read_bytes()


def test_flat_folder_has_no_labels(tmp_path: Path):
    touch(tmp_path / "one.png")
    touch(tmp_path / "sub" / "two.png")
    source = FolderSource(tmp_path)
    assert len(source) == 2
    assert source.labels is None
    assert source.class_names == []


def test_links_are_followed_and_loops_end(tmp_path: Path):
    touch(tmp_path / "real" / "a.png")
    images = tmp_path / "images"
    images.mkdir()
    (images / "class").symlink_to(tmp_path / "real")
    (images / "file.png").symlink_to(tmp_path / "real" / "a.png")
    (images / "loop").symlink_to(images)
    assert len(FolderSource(images)) == 2


def test_train_is_entered_where_only_splits_are_there(tmp_path: Path):
    touch(tmp_path / "train" / "dog" / "a.png")
    touch(tmp_path / "val" / "dog" / "b.png")
    assert FolderSource(tmp_path).folder == tmp_path / "train"
    touch(tmp_path / "truck" / "c.png")  # now `train` is a class, of vehicles
    source = FolderSource(tmp_path)
    assert source.folder == tmp_path
    assert source.class_names == ["train", "truck", "val"]


def test_names_round_trip():
    words = [b"", b"a", b"\xff\xfe", "ü/é".encode(), b""]
    names = Names(words)
    assert [names[i] for i in range(len(names))] == words
    assert len(Names([])) == 0


def test_missing_empty_and_small_folders(tmp_path: Path):
    def build(path: Path | str, **changes: object) -> None:
        build_loader(DataSettings(root_path=str(path), loader="torchvision", num_workers=0, **changes), seed=0)

    with pytest.raises(DataError, match=r"nowhere does not exist.*data\.image_folder"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images below .*empty.*\.jpg .*\.png"):
        build(tmp_path / "empty")
    touch(tmp_path / "file.png")
    with pytest.raises(DataError, match="not a folder"):
        build(tmp_path / "file.png")
    with pytest.raises(DataError, match="no images are named"):
        build("")
    for number in range(3):
        touch(tmp_path / "few" / f"{number}.png")
    with pytest.raises(DataError, match=r"4 images x 1 processes = 4, but there are 3 images"):
        build(tmp_path / "few", batch_size=4)
    build_loader(DataSettings(root_path=str(tmp_path / "few"), batch_size=3, num_workers=0), seed=0)
    settings = DataSettings(root_path=str(tmp_path / "few"), batch_size=2, num_workers=0)
    with pytest.raises(DataError, match=r"2 images x 2 processes"):
        build_loader(settings, seed=0, world_size=2)


@contextlib.contextmanager
def permissions() -> Iterator[None]:
    """They concern everyone but root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_may_not_be_read_is_named(monkeypatch):
    with tempfile.TemporaryDirectory() as temporary:  # not in a folder of pytest, which are closed to others
        monkeypatch.setenv("DMTJEPA_CACHE", temporary)
        Path(temporary).chmod(0o755)
        shard, folder = Path(temporary, "a.tar"), Path(temporary, "images")
        tarfile.open(shard, "w").close()
        shard.chmod(0)
        with permissions(), pytest.raises(DataError, match=r"cannot read the shard .*/a\.tar: Permission denied"):
            open_images(shard)
        for name in "ab":
            touch(folder / "inner" / f"{name}.png")
        (folder / "inner" / "b.png").chmod(0)
        settings = DataSettings(
            root_path=str(folder), batch_size=2, crop_size=8, max_broken=1, num_workers=0, loader="torchvision"
        )
        with permissions():
            loader = build_loader(settings, seed=0)
            assert len(list(loader.epoch(0))) == 1
        assert loader.corrupt == [(str(folder / "inner" / "b.png"), "Permission denied")]
        (folder / "inner").chmod(0)
        with permissions(), pytest.raises(DataError, match=r"cannot list the images of .*Permission denied: .*inner"):
            open_images(folder)
        folder.chmod(0)
        with permissions(), pytest.raises(DataError, match=r"cannot read .*/images.*: Permission denied"):
            open_images(folder)
        folder.chmod(0o700)
        (folder / "inner").chmod(0o700)


def test_labels_are_int64(image_folder: Path):
    assert FolderSource(image_folder).labels.dtype == np.int64
