"""Tells a lack of memory, file descriptors or disk space from an image that cannot be read."""

from __future__ import annotations

import errno
import resource

from dmtjepa.data.sources.base import DataError

_FEW_BYTES = 1 << 28  # what must be left where the size of an image is not known


def check_resources(error: BaseException) -> None:
    """Raise DataError with the limit and the remedy if an error says that the system lacks something.

    Such an error is not the fault of the image: replacing the image would silently change what is trained on.
    """
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code != errno.ENFILE and (code == errno.EMFILE or "Too many open files" in text):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise DataError(
            f"a process of this run has as many open files as it may have ({limit}). Raise the limit (ulimit -n 65536) "
            f"or lower data.num_workers ({text})"
        ) from error
    if code == errno.ENFILE:
        raise DataError(
            f"the system has as many open files as it can have. Raise fs.file-max (sysctl), or close other programs "
            f"({text})"
        ) from error
    if is_memory_error(error):
        raise DataError(
            f"there is not enough memory to load images. Lower data.num_workers or data.max_megapixels, or raise the "
            f"limit of this job (ulimit -v, --mem of SLURM, the limit of a container) ({type(error).__name__}: {text})"
        ) from error
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise DataError(
            f"no space is left for loading images. Give /dev/shm more room (docker run --shm-size=16g), or free some "
            f"space on the disk ({text})"
        ) from error


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that an allocation failed. PIL and PyTorch say it in words alone."""
    code = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or code == errno.ENOMEM or "out of memory" in str(error)


def is_memory_left(num_bytes: int) -> bool:
    """Whether this process can allocate `num_bytes`, or 256 MiB if they are 0."""
    try:
        bytearray(num_bytes or _FEW_BYTES)
    except MemoryError:
        return False
    return True
