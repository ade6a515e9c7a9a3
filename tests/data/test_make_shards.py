"""Writing tar shards: continuing, full disks, kills, and names of any bytes."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dmtjepa.cli import check, shards
from dmtjepa.data import DataError, make_shards, open_images
from dmtjepa.data.sources.folder import FolderSource
from tests.helpers.images import contents


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
    assert shards.main([str(tmp_path / "images"), str(tmp_path / "out"), "--shard-size", "100"]) == 1
    assert "ant/000.jpg: No such file" in capsys.readouterr().err
    assert len(open_images(tmp_path / "out")) == 29
    assert shards.main([str(tmp_path / "nowhere"), str(tmp_path / "out2")]) == 1
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
        assert shards.main([str(tmp_path / "images"), str(tmp_path / "out")]) == 1
        assert "29 images in 1 shard in " in (text := capsys.readouterr().out)
        assert "(1 could not be read and are left out)" in text


@pytest.mark.slow
def test_packing_survives_a_kill_and_a_full_disk(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    killed = f"""if True:
        import os, signal
        from dmtjepa.cli import shards
        from dmtjepa.data import FolderSource, make_shards

        read = FolderSource.read
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        FolderSource.read = lambda self, image: kill() if image == 20 else read(self, image)
        shards.main([{str(image_folder)!r}, {str(out)!r}, "--shard-size", "8", "--threads", "1"])
    """
    assert subprocess.run([sys.executable, "-c", killed], timeout=300).returncode == -signal.SIGKILL
    whole = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert len(whole) == 2

    def fill(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_add", fill)
        assert shards.main([str(image_folder), str(out), "--shard-size", "8"]) == 1
    assert re.search(r"cannot write .*-00000[23]\.tar: No space left on device.*start again", capsys.readouterr().err)
    assert not list(out.glob(".shard-*"))
    assert shards.main([str(image_folder), str(out), "--shard-size", "8"]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))][:2] == whole
    assert contents(open_images(out)) == contents(FolderSource(image_folder))


def test_packing_into_the_images_own_folder(image_folder: Path, tmp_path: Path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    with pytest.raises(SystemExit):
        shards.main([str(images), f"{images}/ant/.."])
    assert "write to another folder" in capsys.readouterr().err
    for _ in range(2):  # below it is no harm: tar files are no images
        assert shards.main([str(images), str(images / "packed")]) == 0
    assert contents(open_images(images / "packed")) == contents(FolderSource(images))


def test_names_of_any_bytes_are_packed_and_checked(image_folder: Path, tmp_path: Path, capsysbinary):
    images = os.fsencode(tmp_path / "images")
    for name in (b"a \xff", "é".encode(), b"line\nbreak"):
        os.makedirs(images + b"/" + name)
        shutil.copy(image_folder / "ant" / "000.jpg", images + b"/" + name + b"/x\xfe.jpg")
    Path(os.fsdecode(images + b"/a \xff/y\xfd.jpg")).write_bytes(b"no image")
    assert shards.main([os.fsdecode(images), str(tmp_path / "out")]) == 0
    source, packed = open_images(os.fsdecode(images)), open_images(tmp_path / "out")
    assert contents(packed) == contents(source)
    assert packed.labels.tolist() == source.labels.tolist() == [0, 0, 1, 2]
    assert packed.class_names == ["a \udcff", "line break", "é"]
    for path in (os.fsdecode(images), str(tmp_path / "out")):
        assert check.main([path, "--workers", "1"]) == 1
        assert b"a \\udcff/" in capsysbinary.readouterr().out
