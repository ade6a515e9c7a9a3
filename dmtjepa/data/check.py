"""Checks a data set before a long run: `dmtjepa check SOURCE`.

Reads and decodes every image in parallel, and reports counts, sizes, formats, corrupt files and duplicates.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, ImageSource
from dmtjepa.data.decode import MAX_MEGAPIXELS, CorruptImage, Picture, decode_image, read_kind, tell_reason
from dmtjepa.data.sources.base import make_printable
from dmtjepa.processes import enter_worker

logger = logging.getLogger(__name__)

_CHUNK = 64
_MAX_GROUPS = 20  # groups of duplicates that are listed
_MAX_NAMES = 4  # names in a group that are listed
_NUM_SAMPLED = 8  # images that `check_sample` decodes


class Finding(NamedTuple):
    """Format and mode of an image as PIL names them, its size, and a digest of its bytes; or why it is corrupt."""

    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    reason: str = ""
    moments: np.ndarray | None = None  # [2, C]: means of the pixels in [0, 1] and of their squares; None: not measured


@dataclass
class Report:
    """The findings of all images in a source."""

    num_images: int
    num_classes: int
    sizes: np.ndarray = field(
        default_factory=lambda: np.empty((0, 2), np.int64)
    )  # (width, height) of those that decode
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    moments: list[np.ndarray] = field(default_factory=list)  # of the images whose pixels were measured

    def __str__(self) -> str:
        lines = [f"images      {self.num_images}, {self.num_images - len(self.corrupt)} of them decode"]
        if self.num_classes:
            lines.append(f"classes     {self.num_classes}")
        if len(self.sizes):
            for name, values in (("widths", self.sizes[:, 0]), ("heights", self.sizes[:, 1])):
                lines.append(f"{name:<11} {values.min()} to {values.max()}, median {int(np.median(values))}")
        for name, counts in (("formats", self.formats), ("modes", self.modes)):
            if counts:
                lines.append(f"{name:<11} " + ", ".join(f"{key} {count}" for key, count in counts.most_common()))
        lines += self._describe_pixels()
        copies = sum(len(group) - 1 for group in self.duplicates)
        lines.append(f"duplicates  {copies} copies of {len(self.duplicates)} images (same bytes)")
        lines += _shorten(["  " + _join_names(group) for group in self.duplicates])
        lines.append(f"corrupt     {len(self.corrupt)}")
        lines += [f"  {name}: {reason}" for name, reason in self.corrupt]
        return "\n".join(lines)

    def measure_pixels(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, over all pixels; each image counts the same."""
        mean, square = np.mean(self.moments, axis=0)
        return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()

    def _describe_pixels(self) -> list[str]:
        if not self.moments:
            return []
        texts = ["[" + ",".join(f"{value:.4g}" for value in values) + "]" for values in self.measure_pixels()]
        return [
            f"pixels      of {len(self.moments)} images; as settings:",
            f"  data.mean={texts[0]} data.std={texts[1]}",
        ]


def _shorten(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MAX_GROUPS else [*lines[:_MAX_GROUPS], f"  and {len(lines) - _MAX_GROUPS} more"]


def _join_names(names: list[str]) -> str:
    more = f" = {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return " = ".join(names[:_MAX_NAMES]) + more


def examine(
    data: bytes,
    channels: int = 3,
    max_value: float | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    *,
    measured: bool = False,
) -> Finding:
    """Decode an image and describe it; if `measured`, with the moments of its pixels."""
    try:
        picture = decode_image(data, max_megapixels, channels, max_value)
        form, mode = read_kind(data)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        moments = _measure(picture) if measured else None
        return Finding(form, mode, *picture.size, digest, moments=moments)
    except CorruptImage as error:
        return Finding(reason=str(error))


def _measure(picture: Picture) -> np.ndarray:
    """Mean of the pixels in [0, 1] of each channel, and of their squares: [2, C]."""
    counts = np.array(picture.histogram(), np.float64).reshape(-1, 256) / (picture.width * picture.height)
    values = np.arange(256) / 255
    return np.stack([counts @ values, counts @ values**2])


def check_sample(source: ImageSource, settings: DataSettings, *, evaluated: bool = False) -> None:
    """Read and decode a few images, evenly spaced. Warns of those that are corrupt.

    Args:
        evaluated: they are measured on, not trained on.

    Raises:
        DataError: all of them are.
    """
    images = np.unique(np.linspace(0, len(source) - 1, _NUM_SAMPLED).astype(int)).tolist()
    corrupt = []
    for image in images:
        try:
            decode_image(source.read(image), settings.max_megapixels, settings.channels, settings.max_value)
        except (CorruptImage, OSError) as error:
            corrupt.append(f"  {make_printable(source.name(image))}: {tell_reason(error)}")
    if not corrupt:
        return
    kind = "images to evaluate on" if evaluated else "images"
    found = f"{len(corrupt)} of {len(images)} {kind} that were tried cannot be decoded"
    listed = "\n".join(["`dmtjepa check SOURCE` tries all:", *corrupt])
    if len(corrupt) == len(images):
        raise DataError(f"{found}. {listed}")
    limit = f"A run stops when more than {settings.max_broken:.3g} of its images are corrupt (data.max_broken)"
    logger.warning("%s. %s. %s", found, "Evaluations leave them out" if evaluated else limit, listed)


_Limits = tuple[int, float | None, float]

# Of this worker process: images; channels, max_value and max_megapixels; and every how many images are measured.
_task: tuple[ImageSource, _Limits, int]


def _init_worker(source: ImageSource, limits: _Limits, stride: int, parent: int) -> None:
    global _task
    _task = source, limits, stride
    enter_worker(parent)


def _examine_chunk(start: int) -> list[Finding]:
    findings = []
    source, limits, stride = _task
    for image in range(start, min(start + _CHUNK, len(source))):
        try:
            findings.append(examine(source.read(image), *limits, measured=image % stride == 0))
        except OSError as error:
            findings.append(Finding(reason=tell_reason(error)))
    return findings


def check(
    source: ImageSource,
    num_workers: int,
    *,
    channels: int = 3,
    max_value: float | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    max_measured: int = 2_000,
) -> Report:
    """Read and decode every image of a source with `num_workers` processes.

    Args:
        channels, max_value, max_megapixels: of the images, see `decode_image`.
        max_measured: the pixels of about this many images, evenly spaced, are measured.
    """
    stride = max(1, -(-len(source) // max_measured)) if max_measured else len(source) + 1
    report = Report(len(source), len(source.class_names))
    sizes, digests = [], defaultdict(list)
    starts = range(0, len(source), _CHUNK)
    limits = channels, max_value, max_megapixels
    pool = ProcessPoolExecutor(num_workers, initializer=_init_worker, initargs=(source, limits, stride, os.getpid()))
    with pool, tqdm(total=len(source), unit=" images", disable=None) as bar:
        try:
            for start, findings in zip(starts, pool.map(_examine_chunk, starts), strict=True):
                for image, finding in enumerate(findings, start):
                    if finding.reason:
                        report.corrupt.append((source.name(image), finding.reason))
                        continue
                    sizes.append((finding.width, finding.height))
                    report.formats[finding.format] += 1
                    report.modes[finding.mode] += 1
                    digests[finding.digest].append(image)
                    if finding.moments is not None:
                        report.moments.append(finding.moments)
                bar.update(len(findings))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, as when the system runs out of memory; lower --workers"
            ) from error
    report.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    report.duplicates = [[source.name(image) for image in same] for same in digests.values() if len(same) > 1]
    return report


if __name__ == "__main__":  # a command of version 0.1.0: a script that calls it must not believe that it did its work
    raise SystemExit("`python -m dmtjepa.data.check` is now `dmtjepa check SOURCE`, with the same options")
