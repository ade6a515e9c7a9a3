"""From settings or a path to a source of images, and to a loader of batches."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path

import torch

from dmtjepa.config import DataSettings, as_file_name
from dmtjepa.data.decode import MAX_MEGAPIXELS
from dmtjepa.data.loaders.base import Loader
from dmtjepa.data.loaders.center_crop import EvaluationLoader
from dmtjepa.data.loaders.pil import PilLoader
from dmtjepa.data.sources.base import LIST_EXTENSIONS, DataError, ImageSource, StoredSource
from dmtjepa.data.sources.file_list import ListSource
from dmtjepa.data.sources.folder import FolderSource, find_images
from dmtjepa.data.sources.huggingface import HuggingFaceSource, is_reference
from dmtjepa.data.sources.shapes import find_shapes
from dmtjepa.data.sources.shards import ShardSource, is_shards

logger = logging.getLogger(__name__)


def open_images(path: str | os.PathLike[str]) -> StoredSource:
    """Open the images at a path: a folder, a file list (.txt, .tsv, .lst), or tar shards (one, a folder, a pattern).

    "hf:..." is a Hugging Face data set, see `Reference`. "shapes:train" and "shapes:val" are the splits of the drawn
    set, which is drawn now if it is not in the cache.

    Raises:
        DataError: there are no images at this path, or they cannot be listed.
    """
    path = as_file_name(os.fspath(path))
    if path in ("shapes:train", "shapes:val"):
        return FolderSource(find_shapes() / path.split(":")[1])
    if is_reference(path):
        return HuggingFaceSource(path)
    try:
        path = os.fspath(find_images(Path(path)))
        shards = is_shards(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from error
    if shards:
        return ShardSource(path)
    if path.endswith(LIST_EXTENSIONS):
        return ListSource(path)
    return FolderSource(path)


def open_source(settings: DataSettings) -> StoredSource:
    """Open the images that the settings name."""
    if settings.dataset == "shapes":
        return open_images("shapes:train")
    if not settings.root_path and not settings.image_folder:
        raise DataError("no images are named: set data.root_path and data.image_folder, or data.dataset: shapes")
    return open_images(settings.path)


def is_dali_installed() -> bool:
    """Whether NVIDIA DALI is installed, found out without importing it."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def check_batch_fits(settings: DataSettings, num_images: int, world_size: int) -> None:
    """Refuse a data set that is smaller than the batches of all processes.

    Raises:
        DataError: with both numbers.
    """
    global_batch = settings.batch_size * world_size
    if num_images < global_batch:
        raise DataError(
            f"the batch is larger than the data set: {settings.batch_size} images x {world_size} processes = "
            f"{global_batch}, but there are {num_images} images; lower data.batch_size"
        )


def check_loader(settings: DataSettings) -> None:
    """Refuse DALI where it is asked for by name and not installed.

    Raises:
        DataError: with the reason.
    """
    if settings.loader == "dali":
        importlib.import_module("dmtjepa.data.loaders.dali")


def build_loader(
    settings: DataSettings,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    source: StoredSource | None = None,
) -> Loader:
    """Build the training loader of a rank. Batches are uint8 [batch_size,C,H,W], pinned if the device is CUDA.

    Args:
        source: what `open_source` has opened; None opens it here.

    Raises:
        DataError: there are fewer images than a global batch needs, or DALI is asked for and does not work.
    """
    if source is None:
        source = open_source(settings)
    check_batch_fits(settings, len(source), world_size)
    device = torch.device(device)
    if settings.loader == "dali" or (settings.loader == "auto" and settings.channels in (1, 3) and is_dali_installed()):
        try:
            from dmtjepa.data.loaders.dali import DaliLoader  # takes a second to import, and is an extra

            return DaliLoader(source, settings, seed=seed, rank=rank, world_size=world_size, device=device)
        except DataError as error:
            if settings.loader == "dali":
                raise
            logger.warning("DALI is installed but does not work here, so PIL loads the images: %s", error)
    pin_memory = settings.pin_mem and device.type == "cuda"
    return PilLoader(source, settings, seed=seed, rank=rank, world_size=world_size, pin_memory=pin_memory)


def build_eval_loader(
    source: str | os.PathLike[str] | ImageSource,
    image_size: int | tuple[int, int],
    batch_size: int,
    *,
    num_workers: int = 0,
    channels: int = 3,
    max_value: float | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    named: set[str] | None = None,
) -> EvaluationLoader:
    """Build a loader that gives every image once, in order, cropped at the centre.

    Args:
        source: a path as in `open_images`, or an open source.
        image_size: of the crop in pixels, one side or (height, width).
        batch_size: images at a time.
        num_workers: processes that read images; 0: this one.
        channels: of the images.
        max_value: what counts as 1 in images of more than 8 bits; None: see `data.max_value`.
        max_megapixels: larger images, by the size that they declare, are left out.
        named: corrupt images that the log has named already, see `EvaluationLoader`.
    """
    if isinstance(source, (str, os.PathLike)):
        source = open_images(source)
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    return EvaluationLoader(
        source,
        size,
        batch_size,
        num_workers=num_workers,
        channels=channels,
        max_value=max_value,
        max_megapixels=max_megapixels,
        named=named,
    )
