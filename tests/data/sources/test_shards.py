"""Tar shards: layouts, labels, indexes, and what can be wrong with them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, build_loader, open_images
from dmtjepa.data.sources.folder import FolderSource
from dmtjepa.data.sources.shards import ShardSource, find_shards
from dmtjepa.data.sources.tar_index import read_index, read_members
from tests.helpers.images import LOADERS, contents, flip_bytes, needs_dali


def test_packed_shards_hold_the_folder(shards: Path, image_folder: Path):
    folder, packed = FolderSource(image_folder), open_images(shards)
    assert isinstance(packed, ShardSource)
    assert len(list(shards.glob("shard-*.tar"))) == 4
    assert contents(packed) == contents(folder)
    assert packed.labels.tolist() == folder.labels.tolist()
    assert packed.class_names == folder.class_names
    assert packed.name(0) == f"{shards}/shard-000000.tar:ant/000000000-000.jpg"
    assert contents(pickle.loads(pickle.dumps(packed))) == contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
def test_loaders_read_shards_and_lists_as_folders(shards: Path, image_folder: Path, tmp_path: Path, loader_name: str):
    listing = tmp_path / "images.txt"
    source = FolderSource(image_folder)
    listing.write_text("".join(f"{source.name(image)}\n" for image in range(len(source))))
    epochs = []
    for path in (image_folder, shards, listing):
        settings = DataSettings(root_path=str(path), batch_size=4, crop_size=32, num_workers=2, loader=loader_name)
        loader = build_loader(settings, seed=3)
        epochs.append(torch.stack(list(loader.epoch(1))))
        loader.close()
    assert torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])


def test_shards_without_index_with_one_and_as_a_pattern(shards: Path, tmp_path: Path):
    whole = contents(open_images(shards))
    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, bare)
    assert contents(open_images(bare)) == whole
    assert len(list((tmp_path / "cache" / "indexes").glob("*.idx"))) == 4
    assert contents(open_images(bare)) == whole  # now by the kept index
    assert contents(open_images(f"{bare}/shard-{{000000..000003}}.tar")) == whole
    assert contents(open_images(f"{bare}/shard-*.tar")) == whole
    assert contents(open_images(bare / "shard-000001.tar")) == whole[8:16]
    assert find_shards(f"{bare}/shard-00000{{1,3}}.tar") == [f"{bare}/shard-000001.tar", f"{bare}/shard-000003.tar"]


def test_a_stale_index_is_not_believed(shards: Path, tmp_path: Path):
    shutil.copy(shards / "shard-000000.tar", tmp_path / "one.tar")
    index = tmp_path / "one.idx"
    index.write_text("v1.2 1\njpg 512 9 wrong.jpg\n")
    os.utime(index, (1, 1))
    assert contents(open_images(tmp_path / "one.tar")) == contents(open_images(shards))[:8]


@needs_dali
def test_indexes_are_dalis(shards: Path, tmp_path: Path):
    tool = Path(sys.executable).parent / "wds2idx"
    copy = Path(shutil.copy(shards / "shard-000002.tar", tmp_path))
    subprocess.run([sys.executable, tool, copy, copy.with_suffix(".idx")], check=True, timeout=300)
    assert copy.with_suffix(".idx").read_text() == (shards / "shard-000002.idx").read_text()
    assert contents(open_images(copy)) == contents(open_images(shards))[16:24]


@pytest.mark.parametrize(("limit", "count"), [(8, 2), (1, 1), (resource.RLIM_INFINITY, 4)])
def test_few_shards_are_held_open_where_few_files_may_be(
    shards: Path, image_folder: Path, monkeypatch, limit: int, count: int
):
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    source = ShardSource(shards)
    assert contents(source) == contents(FolderSource(image_folder))
    assert len(source._open) == count


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_foreign_layouts(tmp_path: Path):
    """Members as other tools write them: in folders, with other files of the sample, long names, no labels."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("./"))
        for number in range(3):
            key = f"./part one/{'é' * 80}{number}"
            add(archive, f"{key}.json", b'{"caption": "a cat"}')
            add(archive, f"{key}.seg.PNG", bytes([number]))
            add(archive, f"{key}.txt", b"a cat")
    source = ShardSource(tmp_path / "a.tar")
    assert contents(source) == [b"\0", b"\1", b"\2"]
    assert source.class_names == ["part one"]
    assert contents(ShardSource(tmp_path / "a.tar")) == contents(source)  # through the kept index
    assert ShardSource(tmp_path / "a.tar").name(2) == source.name(2)
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        add(archive, "000.jpg", b"x")
    assert ShardSource(tmp_path / "b.tar").labels is None


@pytest.mark.parametrize("pass_number", [1, 2], ids=["headers", "index"])
def test_a_sample_is_one_image(tmp_path: Path, pass_number: int):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.seg.png", "1.jpg", "1.cls", "2.jpg", "2.png", "._3.jpg", "b/._3.jpg", "3.a.jpg", "3.b.jpg"):
            add(archive, name, b"0" if name.endswith("cls") else name.encode())
    for _ in range(pass_number):
        source = ShardSource(tmp_path / "a.tar")
    assert contents(source) == [b"1.jpg", b"2.jpg", b"3.a.jpg", b"3.b.jpg"]
    assert source.labels is None  # some are missing, and there are no folders


def test_samples_of_the_same_name_keep_their_own_labels(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for label in (b"2", b"0", b"7000000000"):
            add(archive, "x.jpg", label)
            add(archive, "x.cls", label + b"\n")
    source = ShardSource(tmp_path / "a.tar")
    assert contents(source) == [b"2", b"0", b"7000000000"]
    assert [source.class_names[label].encode() for label in source.labels] == contents(source)


def test_shards_beside_images(shards: Path, image_folder: Path, tmp_path: Path):
    """Which of them are meant is not guessed; compressed tars, which cannot be read, are not meant."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "download.tar.gz").write_bytes(b"\x1f\x8b")
    assert len(open_images(tmp_path / "images")) == 30
    shutil.copy(shards / "shard-000000.tar", tmp_path / "images")
    with pytest.raises(DataError, match=r"contains tar files, and images or folders too: name .*/\*\.tar"):
        open_images(tmp_path / "images")
    assert len(open_images(tmp_path / "images" / "*.tar")) == 8
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.tgz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"only/a\.tgz is compressed"):
        open_images(tmp_path / "only")


def test_an_index_that_is_not_whole_is_not_believed(shards: Path, tmp_path: Path):
    shutil.copy(shards / "shard-000000.tar", tmp_path / "one.tar")
    whole = (shards / "shard-000000.idx").read_text()
    for lines in (3, 0):
        (tmp_path / "one.idx").write_text("".join(whole.splitlines(keepends=True)[:lines]))
        assert contents(open_images(tmp_path / "one.tar")) == contents(open_images(shards))[:8]


def test_wrong_shards(shards: Path, tmp_path: Path, caplog):
    with pytest.raises(DataError, match="no tar file matches"):
        open_images(f"{tmp_path}/*.tar")
    with pytest.raises(DataError, match=r"shard.*missing\.tar does not exist"):
        open_images(tmp_path / "missing.tar")
    (tmp_path / "zipped.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"decompress it to a plain \.tar"):
        open_images(tmp_path / "zipped.tar.gz")
    (tmp_path / "noise.tar").write_bytes(os.urandom(3000))
    with pytest.raises(DataError, match="is not a complete tar file"):
        open_images(tmp_path / "noise.tar")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((shards / "shard-000000.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match="is not a complete tar file"):
        open_images(cut)
    shutil.copy(shards / "shard-000000.idx", tmp_path / "cut.idx")
    with pytest.raises(DataError, match="shorter than its index"):
        open_images(cut)
    members = read_members(str(shards / "shard-000000.tar"))
    short = tmp_path / "short.tar"
    short.write_bytes((shards / "shard-000000.tar").read_bytes()[: members[4].offset - 512])
    assert len(open_images(short)) == 2
    assert "short.tar has no end-of-archive mark" in caplog.text
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.add(__file__, "a.py")
    with pytest.raises(DataError, match="no images in 1 shards"):
        open_images(tmp_path / "texts.tar")


def test_members_are_found_without_reading_the_data(shards: Path):
    members = read_members(str(shards / "shard-000003.tar"))
    assert [member.extension for member in members] == [b"jpg", b"cls"] * 6


def link(archive: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


def test_links_in_a_tar_are_resolved_and_others_are_named(tmp_path: Path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a/1.jpg", b"1")
        add(archive, "a/1.cls", b"0")
        link(archive, "b/2.jpg", "../a/3.jpg")  # to a link that follows
        link(archive, "b/2.cls", "a/4.cls", tarfile.LNKTYPE)
        link(archive, "a/3.jpg", "a/1.jpg", tarfile.LNKTYPE)
        link(archive, "a/3.cls", "1.cls")
        add(archive, "a/4.cls", b"7")
        link(archive, "c/5.jpg", "/etc/passwd")
        link(archive, "c/6.jpg", "6.jpg")
        link(archive, "c/7.jpg", "", tarfile.FIFOTYPE)
    for _ in range(2):  # each start says what is left out
        source = ShardSource(tmp_path / "a.tar")
        assert contents(source) == [b"1", b"1", b"1"]
        assert [source.class_names[label] for label in source.labels] == ["0", "7", "0"]
        assert "3 members are left out" in caplog.text
        assert "c/5.jpg, c/6.jpg, c/7.jpg" in caplog.text
        caplog.clear()


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path, caplog):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            add(archive, f"{number}.jpg", bytes([number]) * 700)
    whole = b"".join((tmp_path / f"{number}.tar").read_bytes() for number in range(3))
    (tmp_path / "all.tar").write_bytes(whole + bytes(3 * 512))
    for _ in range(2):
        assert contents(ShardSource(tmp_path / "all.tar")) == [bytes([number]) * 700 for number in range(3)]
    (tmp_path / "tail.tar").write_bytes(whole + b"x" * 1024)
    assert len(ShardSource(tmp_path / "tail.tar")) == 3
    assert "1024 bytes after the end-of-archive mark are ignored" in caplog.text


def test_a_damaged_header_within_a_shard_is_an_error(shards: Path, tmp_path: Path):
    data = bytearray((shards / "shard-000000.tar").read_bytes())
    member = read_members(str(shards / "shard-000000.tar"))[6]
    data[member.offset - 512 : member.offset - 412] = b"?" * 100
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"is not a complete tar file: the header at \d+ is damaged"):
        open_images(tmp_path / "a.tar")


def test_nested_tars_are_named(tmp_path: Path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("n1.tar", "n2.tar"):
            add(archive, name, (b"x" * 100))
    with pytest.raises(DataError, match=r"2 members are tar files themselves, such as n1\.tar: unpack the outer tar"):
        open_images(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        add(archive, "n1.tar", b"x")
        add(archive, "1.jpg", b"1")
    assert len(open_images(tmp_path / "b.tar")) == 1
    assert "1 members are tar files themselves" in caplog.text


NAMES = [
    "a b.jpg", "1.jpg", "2 3 4.jpg", "x y/5.b c.jpg", "tab\tin.jpg", "line\nin.jpg", "back\\x20slash.jpg", "v1.2 9.jpg",
    "README", "dot.5.6.png", "é\udcff.jpg", "LICENSE", "jpg",
]  # fmt: skip


def test_the_second_start_finds_the_same_as_the_first(tmp_path: Path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in NAMES:
            add(archive, name, os.fsencode(name))
    first, second = ShardSource(tmp_path / "a.tar"), ShardSource(tmp_path / "a.tar")
    expected = [os.fsencode(name) for name in NAMES if name.endswith((".jpg", ".png"))]
    assert contents(first) == contents(second) == expected
    assert [first.name(image) for image in range(len(first))] == [second.name(image) for image in range(len(second))]
    assert list((tmp_path / "cache" / "indexes").glob("*.idx"))
    assert not caplog.records  # the index of the first start was used


def test_indexes_of_other_writers(shards: Path, tmp_path: Path):
    shard = shutil.copy(shards / "shard-000000.tar", tmp_path / "a.tar")
    text = (shards / "shard-000000.idx").read_text()
    whole = read_index(shards / "shard-000000.idx", str(shards / "shard-000000.tar"))
    assert whole == read_members(str(shard))
    index = tmp_path / "a.idx"
    for variant in (text.replace("\n", "\n\n"), text.replace("\n", "\r\n"), text.replace(" ", "  "), text + "\n\n"):
        index.write_bytes(variant.encode())
        assert read_index(index, shard) == whole
    lines = [" ".join(line.split()[:3] + line.split()[4:7]) for line in text.splitlines()[1:]]
    index.write_text("\n".join(["v1.1 8", *lines]))
    assert [member[:3] for member in read_index(index, shard)] == [member[:3] for member in whole]


@pytest.mark.parametrize(
    "line", ["jpg 512 -5 a.jpg", "jpg -512 100 a.jpg", "jpg x y a.jpg", "jpg 512 999999999999999999999999 a.jpg",
             "jpg 513 9 a.jpg", "jpg 512", "jpg 512 1 a.jpg", "\0\0\0\0"],
)  # fmt: skip
def test_a_garbage_index_is_replaced_by_the_headers(shards: Path, tmp_path: Path, line: str, caplog):
    shutil.copy(shards / "shard-000000.tar", tmp_path / "a.tar")
    text = (shards / "shard-000000.idx").read_text().splitlines()
    (tmp_path / "a.idx").write_text("\n".join([text[0], line, *text[2:]]) + "\n")
    assert contents(open_images(tmp_path / "a.tar")) == contents(open_images(shards))[:8]
    assert "a.idx" in caplog.text
    assert "are read instead" in caplog.text


def test_no_damage_of_an_index_goes_unnoticed_or_crashes(shards: Path, tmp_path: Path):
    """Any index is believed only if it describes members that lie in the shard."""
    shard = str(shutil.copy(shards / "shard-000000.tar", tmp_path / "a.tar"))
    index, size = tmp_path / "a.idx", os.path.getsize(shard)
    text = (shards / "shard-000000.idx").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        index.write_bytes(flip_bytes(text, rng))
        members = None
        with contextlib.suppress(DataError):  # it can be a valid index of a longer shard
            members = read_index(index, shard)
        assert members is None or all(0 <= member.offset <= size - member.size for member in members)
