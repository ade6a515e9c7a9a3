"""Counts and names the images that cannot be decoded, and stops the run when there are too many."""

from __future__ import annotations

import logging
from typing import NoReturn

from dmtjepa.data.sampling import MAX_ATTEMPTS
from dmtjepa.data.sources.base import DataError, ImageSource, make_printable

logger = logging.getLogger(__name__)

_MAX_LISTED = 10  # the log has named all of them


class CorruptImages:
    """The corrupt images that this rank has met. `entries` is [(name, reason)] in the order in which they were met."""

    def __init__(self, source: ImageSource, max_broken: float, world_size: int) -> None:
        self.entries: list[tuple[str, str]] = []
        self._source, self._max_broken = source, max_broken
        self._seen: set[int] = set()
        # A rank meets 1/world_size of the images in an epoch, so the limit is a fraction of that many.
        self._num_per_epoch = len(source) // world_size
        self._num_drawn = 0

    def record(self, num_samples: int, corrupt: list[tuple[int, str]]) -> None:
        """Count `num_samples` drawn samples, and log the (image, reason) pairs that are new.

        Raises:
            DataError: more than the allowed fraction of the images is corrupt.
        """
        self._num_drawn += num_samples
        for image, reason in corrupt:
            if image not in self._seen:
                self._seen.add(image)
                self.entries.append((self._source.name(image), reason))
                name = make_printable(self._source.name(image))
                logger.warning("skipped a corrupt image (%d so far): %s: %s", len(self.entries), name, reason)
        num_met = min(len(self._source), max(self._num_per_epoch, self._num_drawn))
        if len(self.entries) > self._max_broken * num_met:
            self._stop(f"more than data.max_broken = {self._max_broken:g} of the {num_met} images read so far")

    def stop_without_replacement(self) -> NoReturn:
        """Raise DataError because every candidate for a place in a batch is corrupt."""
        self._stop(f"{MAX_ATTEMPTS} in a row for one place in a batch. Check that the data set is still there")

    def _stop(self, cause: str) -> NoReturn:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in self.entries[:_MAX_LISTED])
        rest = f"\n  and {len(self.entries) - _MAX_LISTED} more" if len(self.entries) > _MAX_LISTED else ""
        raise DataError(
            f"corrupt images: {len(self.entries)}, {cause}. Remove or repair them (`dmtjepa check SOURCE` lists "
            f"all of them), or raise data.max_broken:\n{listed}{rest}"
        )
