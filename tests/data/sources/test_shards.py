"""Tar shards and file lists: reading, indexes, packing, and what is wrong with them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, build_eval_loader, build_loader, check, make_shards, open_images
from dmtjepa.data.sources.file_list import ListSource
from dmtjepa.data.sources.folder import FolderSource
from dmtjepa.data.sources.shards import ShardSource, find_shards
from dmtjepa.data.sources.tar_index import read_members
from tests.helpers.images import needs_dali


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DMTJEPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    assert make_shards.main([str(image_folder), str(out), "--shard-size", "8"]) == 0
    return out


def contents(source) -> list[bytes]:
    return [source.read(image) for image in range(len(source))]


def test_packed_shards_hold_the_folder(shards: Path, image_folder: Path):
    folder, packed = FolderSource(image_folder), open_images(shards)
    assert isinstance(packed, ShardSource)
    assert len(list(shards.glob("shard-*.tar"))) == 4
    assert contents(packed) == contents(folder)
    assert packed.labels.tolist() == folder.labels.tolist()
    assert packed.class_names == folder.class_names
    assert packed.name(0) == f"{shards}/shard-000000.tar:ant/000000000-000.jpg"
    assert contents(pickle.loads(pickle.dumps(packed))) == contents(folder)


@pytest.mark.parametrize("loader_name", ["torchvision", pytest.param("dali", marks=needs_dali)])
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
    subprocess.run([sys.executable, tool, copy, copy.with_suffix(".idx")], check=True, timeout=60)
    assert copy.with_suffix(".idx").read_text() == (shards / "shard-000002.idx").read_text()
    assert contents(open_images(copy)) == contents(open_images(shards))[16:24]


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
    with pytest.raises(DataError, match=r"holds tar files, and images or folders too: name the shards as .*/\*\.tar"):
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
    with pytest.raises(DataError, match=r"unpack it to a plain \.tar"):
        open_images(tmp_path / "zipped.tar.gz")
    (tmp_path / "noise.tar").write_bytes(os.urandom(3000))
    with pytest.raises(DataError, match="is no whole tar file"):
        open_images(tmp_path / "noise.tar")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((shards / "shard-000000.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match="is no whole tar file"):
        open_images(cut)
    shutil.copy(shards / "shard-000000.idx", tmp_path / "cut.idx")
    with pytest.raises(DataError, match="shorter than its index"):
        open_images(cut)
    members = read_members(str(shards / "shard-000000.tar"))
    short = tmp_path / "short.tar"
    short.write_bytes((shards / "shard-000000.tar").read_bytes()[: members[4].offset - 512])
    assert len(open_images(short)) == 2
    assert "short.tar has no end mark" in caplog.text
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.add(__file__, "a.py")
    with pytest.raises(DataError, match="no images in 1 shards"):
        open_images(tmp_path / "texts.tar")


def test_packing_goes_on_where_it_stopped(image_folder: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    source = FolderSource(image_folder)
    original, count = FolderSource.read, []

    def fail_late(self: FolderSource, image: int) -> bytes:
        count.append(image)
        if len(count) == 20:
            raise KeyboardInterrupt
        return original(self, image)

    monkeypatch.setattr(FolderSource, "read", fail_late)
    with pytest.raises(KeyboardInterrupt):
        make_shards.make_shards(source, out, 8, num_threads=1)
    done = sorted(path.name for path in out.glob("*.tar"))
    assert "shard-000000.tar" in done
    assert "shard-000002.tar" not in done
    before = [(out / name).stat().st_mtime_ns for name in done]
    monkeypatch.setattr(FolderSource, "read", original)
    assert make_shards.make_shards(source, out, 8, num_threads=1) == []
    assert [(out / name).stat().st_mtime_ns for name in done] == before
    assert contents(open_images(out)) == contents(source)
    with pytest.raises(DataError, match="of other images or of another size"):
        make_shards.make_shards(source, out, 9)


def test_packing_leaves_out_and_names_what_it_cannot_read(image_folder: Path, tmp_path: Path, capsys):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "ant" / "000.jpg").unlink()
    (tmp_path / "images" / "ant" / "000.jpg").symlink_to(tmp_path / "gone")
    assert make_shards.main([str(tmp_path / "images"), str(tmp_path / "out"), "--shard-size", "100"]) == 1
    assert "ant/000.jpg: No such file" in capsys.readouterr().err
    assert len(open_images(tmp_path / "out")) == 29
    assert make_shards.main([str(tmp_path / "nowhere"), str(tmp_path / "out2")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_progress_bar_counts_images_and_what_is_there_already(image_folder: Path, tmp_path: Path, monkeypatch):
    bars = []

    class Bar(make_shards.tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            self.steps = []
            bars.append(self)

        def update(self, n: int = 1) -> None:
            self.steps.append(n)

    monkeypatch.setattr(make_shards, "tqdm", Bar)
    for _ in range(2):
        make_shards.make_shards(FolderSource(image_folder), tmp_path / "out", 16)
    assert [bar.total for bar in bars] == [30, 30]
    assert [sorted(bar.steps) for bar in bars] == [[1] * 30, [14, 16]]


def test_a_second_call_tells_again_of_what_was_left_out(image_folder: Path, tmp_path: Path, capsys):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "ant" / "000.jpg").unlink()
    (tmp_path / "images" / "ant" / "000.jpg").symlink_to(tmp_path / "gone")
    for _ in range(2):
        assert make_shards.main([str(tmp_path / "images"), str(tmp_path / "out")]) == 1
        assert "29 images in 1 shards" in (text := capsys.readouterr().out)
        assert "(1 could not be read and are left out)" in text


def test_packing_survives_a_kill_and_a_full_disk(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    killed = f"""if True:
        import os, signal
        from dmtjepa.data import FolderSource, make_shards

        read = FolderSource.read
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        FolderSource.read = lambda self, image: kill() if image == 20 else read(self, image)
        make_shards.main([{str(image_folder)!r}, {str(out)!r}, "--shard-size", "8", "--threads", "1"])
    """
    assert subprocess.run([sys.executable, "-c", killed], timeout=60).returncode == -signal.SIGKILL
    whole = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert len(whole) == 2

    def fill(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_add", fill)
        assert make_shards.main([str(image_folder), str(out), "--shard-size", "8"]) == 1
    assert re.search(r"cannot write .*-00000[23]\.tar: No space left on device.*start again", capsys.readouterr().err)
    assert not list(out.glob(".shard-*"))
    assert make_shards.main([str(image_folder), str(out), "--shard-size", "8"]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))][:2] == whole
    assert contents(open_images(out)) == contents(FolderSource(image_folder))


def test_packing_into_the_images_own_folder(image_folder: Path, tmp_path: Path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    with pytest.raises(SystemExit):
        make_shards.main([str(images), f"{images}/ant/.."])
    assert "write to another folder" in capsys.readouterr().err
    for _ in range(2):  # below it is no harm: tar files are no images
        assert make_shards.main([str(images), str(images / "packed")]) == 0
    assert contents(open_images(images / "packed")) == contents(FolderSource(images))


def test_names_of_any_bytes_are_packed_and_checked(image_folder: Path, tmp_path: Path, capsysbinary):
    images = os.fsencode(tmp_path / "images")
    for name in (b"a \xff", "é".encode(), b"line\nbreak"):
        os.makedirs(images + b"/" + name)
        shutil.copy(image_folder / "ant" / "000.jpg", images + b"/" + name + b"/x\xfe.jpg")
    Path(os.fsdecode(images + b"/a \xff/y\xfd.jpg")).write_bytes(b"no image")
    assert make_shards.main([os.fsdecode(images), str(tmp_path / "out")]) == 0
    source, packed = open_images(os.fsdecode(images)), open_images(tmp_path / "out")
    assert contents(packed) == contents(source)
    assert packed.labels.tolist() == source.labels.tolist() == [0, 0, 1, 2]
    assert packed.class_names == ["a \udcff", "line break", "é"]
    for path in (os.fsdecode(images), str(tmp_path / "out")):
        assert check.main([path, "--workers", "1"]) == 1
        assert b"a \\udcff/" in capsysbinary.readouterr().out


def test_check_counts_sizes_duplicates_and_broken_files(image_folder: Path, tmp_path: Path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    assert check.main([str(images), "--workers", "1"]) == 0
    shutil.copy(images / "ant" / "003.jpg", images / "cat" / "copy.jpg")
    (images / "cat" / "bad.jpg").write_bytes(b"bad")
    assert check.main([str(images), "--workers", "2"]) == 1
    text = capsys.readouterr().out
    assert "32, 31 of them good" in text
    assert "duplicates  1 copies of 1 images" in text
    assert "0x" not in text  # what PIL calls the file is no name for it
    assert f"{images / 'ant' / '003.jpg'} = {images / 'cat' / 'copy.jpg'}" in text
    assert f"{images / 'cat' / 'bad.jpg'}: " in text
    assert check.main([str(tmp_path / "nowhere")]) == 2
    capsys.readouterr()
    for number in range(8):
        shutil.copy(images / "ant" / "003.jpg", images / "cat" / f"copy{number}.jpg")
    assert check.main([str(images), "--workers", "1"]) == 1
    assert "copies of 1 images (same bytes)\n" in (text := capsys.readouterr().out)
    assert text.count("copy") == 3
    assert " = 6 more\n" in text


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


def test_a_pipe_in_a_list_is_no_image_and_is_not_waited_for(image_folder: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text(f"pipe.jpg\n{image_folder / 'ant' / '000.jpg'}\n")
    report = check.check(open_images(tmp_path / "list.txt"), num_workers=1)
    assert report.corrupt == [(str(tmp_path / "pipe.jpg"), "empty file")]


def test_members_are_found_without_reading_the_data(shards: Path):
    members = read_members(str(shards / "shard-000003.tar"))
    assert [member.extension for member in members] == [b"jpg", b"cls"] * 6
