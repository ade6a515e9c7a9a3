"""A log file that cannot be written stops nothing, and gets its records when it can be written again."""

import errno
import logging
import os

import pytest

from dmtjepa.log_file import LogFile


class FullDisk:
    """`os.write` on a disk with room for `room` more bytes."""

    def __init__(self, monkeypatch, room):
        self.room, self._write = room, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor, block):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(descriptor, block[: self.room])
        self.room -= count
        return count


def test_records_are_whole_and_in_order_after_the_disk_was_full(tmp_path, monkeypatch, caplog):
    log = LogFile(tmp_path / "log")
    disk = FullDisk(monkeypatch, 25)
    records = [b"record %03d\n" % number for number in range(9)]  # of 11 bytes
    with caplog.at_level(logging.WARNING):
        for record in records[:4]:
            log.write(record)
        assert not log.flush()
        assert (tmp_path / "log").read_bytes() == b"".join(records[:2])
        log.write(records[4])
        assert not log.flush()
        disk.room = 1000
        for record in records[5:]:
            log.write(record)
        assert log.flush()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"".join(records)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "No space left on device. Training goes on" in messages[0]
    assert messages[1].endswith("is written again")


def test_what_is_kept_is_bounded_and_what_is_lost_is_counted(tmp_path, monkeypatch, caplog):
    log = LogFile(tmp_path / "log", max_kept=55)
    disk = FullDisk(monkeypatch, 0)
    for number in range(20):
        log.write(b"record %03d\n" % number)
        log.flush()
    disk.room = 1000
    log.flush()
    assert (tmp_path / "log").read_bytes() == b"".join(b"record %03d\n" % number for number in range(15, 20))
    assert "without 15 records" in caplog.text


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_path_that_comes_back_is_written_again(tmp_path, gone):
    path = tmp_path / "folder" / "log"
    if gone == "file":
        path.parent.mkdir()
    log = LogFile(path)
    log.write(b"first\n")
    if gone == "folder":
        assert not log.flush()
        path.parent.mkdir()
    assert log.flush()
    assert path.read_bytes() == b"first\n"


def test_a_file_is_opened_again_after_an_error(tmp_path, monkeypatch):
    """The descriptor of a file system that was away stays useless, and the file can be another one now."""
    path = tmp_path / "log"
    log = LogFile(path)
    log.write(b"first\n")
    assert log.flush()

    def fail(descriptor, block):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        log.write(b"second\n")
        assert not log.flush()
    path.unlink()
    log.write(b"third\n")
    assert log.flush()
    assert path.read_bytes() == b"second\nthird\n"
