"""Standard output and standard error that fail."""

import errno
import os


class BrokenPipe:
    """A stream whose reader is gone."""

    def isatty(self):
        return False

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    flush = isatty
