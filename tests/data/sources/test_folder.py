"""Listing of folders, and the errors a new user meets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, build_loader, open_images
from dmtjepa.data.cache import cache_folder
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


def test_each_folder_is_listed_once_and_under_its_own_path(tmp_path: Path, caplog):
    """Eight folders with links to each other have millions of paths."""
    images = tmp_path / "images"
    for number in range(8):
        touch(images / f"d{number}" / f"{number}.png")
    for number in range(8):
        for other in range(8):
            if other != number:
                (images / f"d{number}" / f"a-link-{other}").symlink_to(images / f"d{other}")
    touch(tmp_path / "outside" / "x.png")
    (images / "above").symlink_to(tmp_path)  # contains `images` itself
    source = FolderSource(images)
    names = [os.path.relpath(source.name(image), images) for image in range(len(source))]
    assert names == ["above/outside/x.png", *(f"d{number}/{number}.png" for number in range(8))]
    assert "57 links to folders that are listed already are ignored" in caplog.text


@pytest.mark.parametrize(
    "other", [None, "annotations", "lost+found", "devkit", "masks/train/a", "unlabeled/a", "truck"]
)
def test_of_a_root_with_splits_only_train_is_read(tmp_path: Path, other: str | None):
    touch(tmp_path / "train" / "dog" / "a.png")
    touch(tmp_path / "val" / "dog" / "b.png")
    if other is not None:
        touch(tmp_path / other / "c.png")
    assert FolderSource(tmp_path).folder == tmp_path / "train"


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "validation"), ("TRAIN", "test"), ("train", "masks")])
def test_other_names_of_splits(tmp_path: Path, names: tuple[str, str]):
    for name in names:
        touch(tmp_path / name / "dog" / "a.png")
    assert FolderSource(tmp_path).folder == tmp_path / names[0]


def test_train_can_be_a_class(tmp_path: Path):
    for name in ("train", "truck"):
        touch(tmp_path / name / "a.png")
    source = FolderSource(tmp_path)
    assert source.folder == tmp_path
    assert source.class_names == ["train", "truck"]


def test_a_source_says_what_it_holds(image_folder: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text(f"{image_folder}/ant/000.jpg\n")
    assert open_images(image_folder).describe() == f"30 images of 3 classes below {image_folder}"
    assert open_images(tmp_path / "list.txt").describe() == f"1 images in the list {tmp_path / 'list.txt'}"


def test_names_that_are_not_utf8_survive_from_listing_to_message(tmp_path: Path, caplog):
    folder = os.fsencode(tmp_path) + b"/images"
    os.mkdir(folder)
    for number in range(4):
        with open(folder + b"/%d-\xff\xe9.png" % number, "wb") as file:
            file.write(b"no image")
    settings = DataSettings(root_path=os.fsdecode(folder), batch_size=4, loader="pil", num_workers=0)
    with pytest.raises(DataError) as error:
        next(build_loader(settings, seed=0).epoch(0))
    for text in (str(error.value), caplog.text):
        assert f"{tmp_path}/images/0-\\xff\\xe9.png: " in text
        text.encode()


@pytest.mark.slow
def test_a_locale_that_is_ascii(tmp_path: Path):
    touch(tmp_path / "bild er ü 画" / "é.png")
    touch(tmp_path / "bild er ü 画" / "b.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/bild er ü 画/é.png\n", encoding="utf-8")
    program = f"""if True:
        import os, sys
        from dmtjepa.config import expand_path
        from dmtjepa.data import open_images
        assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
        for path in ({f"{tmp_path}/bild er ü 画"!a}, {f"{tmp_path}/list.txt"!a}):
            source = open_images(path)
            print([len(source.read(image)) > 0 for image in range(len(source))])
        os.mkdir(expand_path({f"{tmp_path}/läuf"!a}, "logging.folder"))
    """
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[True, True]\n[True]\n", done.stderr
    assert (tmp_path / "läuf").is_dir(), done.stderr


def test_a_user_without_home_has_a_cache(monkeypatch):
    for name in ("DMTJEPA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def raise_without_home(_path):
        raise RuntimeError("Could not determine home directory.")  # as without $HOME and passwd entry

    monkeypatch.setattr(Path, "expanduser", raise_without_home)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"dmtjepa-{os.getuid()}"


def test_names_round_trip():
    words = [b"", b"a", b"\xff\xfe", "ü/é".encode(), b""]
    names = Names(words)
    assert [names[i] for i in range(len(names))] == words
    assert len(Names([])) == 0


def test_missing_empty_and_small_folders(tmp_path: Path):
    def build(path: Path | str, **changes: object) -> None:
        build_loader(DataSettings(root_path=str(path), loader="pil", num_workers=0, **changes), seed=0)

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
            root_path=str(folder), batch_size=2, crop_size=8, max_broken=1, num_workers=0, loader="pil"
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
