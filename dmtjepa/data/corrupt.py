"""Images that cannot be decoded: named once, counted, and too many stop the run."""

from __future__ import annotations

import logging

from dmtjepa.data.sampling import MAX_ATTEMPTS
from dmtjepa.data.sources.base import DataError, ImageSource

logger = logging.getLogger(__name__)

_LISTED = 100


class CorruptImages:
    """The corrupt images this rank has met. `entries` is [(name, reason)] in the order they were met."""

    def __init__(self, source: ImageSource, max_broken: float, world_size: int) -> None:
        self.entries: list[tuple[str, str]] = []
        self._source, self._max_broken = source, max_broken
        self._seen: set[int] = set()
        # A rank meets 1/world_size of the images in an epoch: its share is judged against what it can have met.
        self._num_met = len(source) // world_size
        self._num_drawn = 0

    def record(self, num_samples: int, corrupt: list[tuple[int, str]]) -> None:
        """Count num_samples drawn; log the (image, reason) pairs not met before; DataError when they are too many."""
        self._num_drawn += num_samples
        for image, reason in corrupt:
            if image not in self._seen:
                self._seen.add(image)
                self.entries.append((self._source.name(image), reason))
                logger.warning("skipped a corrupt image (%d so far): %s: %s", len(self.entries), *self.entries[-1])
        met = min(len(self._source), max(self._num_met, self._num_drawn))
        if len(self.entries) > self._max_broken * met:
            self.stop(f"more than data.max_broken = {self._max_broken:g} of the {met} images met so far")

    def stop_lost(self) -> None:
        """Raise DataError: every candidate for a place was corrupt."""
        self.stop(f"{MAX_ATTEMPTS} in a row for one place of a batch: is the data still there?")

    def stop(self, cause: str) -> None:
        """Raise DataError with the cause and the list."""
        listed = "\n".join(f"  {name}: {reason}" for name, reason in self.entries[:_LISTED])
        rest = f"\n  and {len(self.entries) - _LISTED} more" if len(self.entries) > _LISTED else ""
        raise DataError(
            f"{len(self.entries)} images are corrupt, {cause}. Remove or repair them, or raise data.max_broken:\n"
            f"{listed}{rest}"
        )
