"""Files that a run only reports to: when one cannot be written, the run warns, goes on, and writes it later."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_KEPT = 16 << 20  # bytes


class LogFile:
    """A file that records are added to. Those that cannot be written are kept in memory and written later.

    The disk can be full, or the file system away. The file never holds a part of a record in the midst of others.

    Args:
        path: the file. It is created at the first `flush`, and created again if it is gone.
        max_kept: bytes that are kept in memory. The oldest records beyond them are dropped, with a warning at the end.
    """

    def __init__(self, path: Path, max_kept: int = _MAX_KEPT) -> None:
        self._path, self._max_kept = path, max_kept
        self._records: deque[bytes] = deque()
        self._num_bytes = self._num_dropped = 0
        self._descriptor: int | None = None
        self._size: int | None = None  # of the file without a half-written record; None: not known
        self._failing = False

    def write(self, record: bytes) -> None:
        """Add a record, to be written by the next `flush`."""
        self._records.append(record)
        self._num_bytes += len(record)
        while self._num_bytes > self._max_kept and len(self._records) > 1:
            self._num_bytes -= len(self._records.popleft())
            self._num_dropped += 1

    def flush(self) -> bool:
        """Write all records. Returns False if that is not possible now; the first time, a warning says why."""
        try:
            self._write()
        except OSError as error:
            self._close()
            if not self._failing:
                logger.warning(
                    "%s cannot be written: %s. Training goes on; what is logged is kept in memory and written later",
                    self._path, error.strerror or error,
                )  # fmt: skip
            self._failing = True
            return False
        if self._failing:
            lost = f", without {self._num_dropped} records for which there was no room" if self._num_dropped else ""
            logger.warning("%s is written again%s", self._path, lost)
        self._failing, self._num_dropped = False, 0
        return True

    def close(self) -> None:
        """Write what is left, if possible."""
        if not self.flush():
            logger.warning("%s: the last %d records are lost", self._path, len(self._records) + self._num_dropped)
        self._close()

    def _write(self) -> None:
        if not self._records:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            if self._size is None or size < self._size:  # the first time, or the file was replaced
                self._size = size
            os.ftruncate(self._descriptor, self._size)
        assert self._size is not None
        block = b"".join(self._records)
        written = 0
        try:
            while written < len(block):
                written += os.write(self._descriptor, block[written:])
        finally:
            self._drop_written(written)

    def _drop_written(self, written: int) -> None:
        """Forget the records within the first `written` bytes, and take the part of another one off the file."""
        assert self._descriptor is not None
        assert self._size is not None
        whole = 0
        while self._records and whole + len(self._records[0]) <= written:
            whole += len(self._records.popleft())
        self._num_bytes -= whole
        self._size += whole
        if written > whole:
            with contextlib.suppress(OSError):  # the next `_write` does it
                os.ftruncate(self._descriptor, self._size)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.close(descriptor)
