"""A file that is replaced is the old one or the new one, and has the permissions of any new file."""

import os
import stat

import pytest

from dmtjepa import files


def test_contents_are_replaced(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomically(path, "first")
    files.write_atomically(path, b"second")
    assert path.read_text() == "second"
    files.write_json(path, {"a": [1]})
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), files.open_atomically(path) as file:
        file.writelines([b"half of the new", "text in a binary file"])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_replaces_a_file(tmp_path, monkeypatch, links):
    def no_links(*arguments):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    files.link_or_copy(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
