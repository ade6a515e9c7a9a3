"""Standard output and standard error, without which training can go on, and the messages that go there."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any, TextIO


class SafeStream:
    """A text stream whose errors are ignored: a full disk, a pipe that nobody reads, a terminal that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def protect_output() -> None:
    """Let standard output and standard error fail without an error in this process.

    Closed ones lead to /dev/null from now on. Otherwise the next file that is opened gets their number, and messages
    are written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def _writes_its_own(name: str) -> bool:
    """Whether a logger, or one above it other than the root, has a handler that writes to a stream."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.parent is not None:
        if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            return True
        logger = logger.parent
    return False


class MessageHandler(logging.Handler):
    """Writes messages to standard error, above a progress bar if there is one.

    Those of libraries that write their own there, as huggingface_hub does, are left to them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if _writes_its_own(record.name):
            return
        from tqdm import tqdm  # late: a command line that asks for help does not need it

        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def configure_logging(rank: int = 0) -> None:
    """Let this process write its messages to standard error, unless logging is configured already.

    Rank 0 writes messages of level INFO and above. The others write warnings, which begin with their rank.
    """
    if logging.getLogger().handlers:
        return
    handler = MessageHandler()
    prefix = f"rank {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.WARNING if rank else logging.INFO)
