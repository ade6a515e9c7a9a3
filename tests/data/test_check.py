"""The report on a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dmtjepa.cli import check
from dmtjepa.config import parse_config
from dmtjepa.data import DataError, open_images
from dmtjepa.data.check import check as check_all
from dmtjepa.data.check import check_sample


def test_check_counts_sizes_duplicates_and_corrupt_files(image_folder: Path, tmp_path: Path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    assert check.main([str(images), "--workers", "1"]) == 0
    shutil.copy(images / "ant" / "003.jpg", images / "cat" / "copy.jpg")
    (images / "cat" / "bad.jpg").write_bytes(b"bad")
    assert check.main([str(images), "--workers", "2"]) == 1
    text = capsys.readouterr().out
    assert "32, 31 of them decode" in text
    assert "duplicates  1 copies of 1 images" in text
    assert f"{images / 'ant' / '003.jpg'} = {images / 'cat' / 'copy.jpg'}" in text
    assert f"{images / 'cat' / 'bad.jpg'}: not an image that PIL can read\n" in text
    assert check.main([str(tmp_path / "nowhere")]) == 2
    capsys.readouterr()
    for number in range(8):
        shutil.copy(images / "ant" / "003.jpg", images / "cat" / f"copy{number}.jpg")
    assert check.main([str(images), "--workers", "1"]) == 1
    assert "copies of 1 images (same bytes)\n" in (text := capsys.readouterr().out)
    assert text.count("copy") == 3
    assert " = 6 more\n" in text


def test_a_sample_tells_broken_data_before_a_run(image_folder: Path, tmp_path: Path, caplog):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    data = parse_config({}).data
    check_sample(open_images(images), data)
    assert not caplog.records
    files = sorted(images.rglob("*.jpg"))
    files[0].write_bytes(b"bad")  # the first and the last image are always tried
    check_sample(open_images(images), data)
    (record,) = caplog.records
    assert "1 of 8 images" in record.message
    assert f"{files[0]}: not an image that PIL can read" in record.message
    for file in files:
        file.write_bytes(b"bad")
    text = str(check_all(open_images(images), 1))
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["images", "classes", "duplicates", "corrupt"]
    with pytest.raises(DataError, match=r"8 of 8 images that were tried cannot be decoded.*dmtjepa check"):
        check_sample(open_images(images), data)
