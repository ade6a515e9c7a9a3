"""The report on a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

from dmtjepa.cli import check


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
