"""Images from disk to batches of uint8 crops; normalisation happens in the patch embedding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

import torch

from dmtjepa.config import DataSettings
from dmtjepa.data.evaluation import EvaluationLoader
from dmtjepa.data.folder import TorchvisionLoader
from dmtjepa.data.shapes import find_shapes
from dmtjepa.data.sources import DataError, FolderSource, ImageSource

__all__ = ["DataError", "EvaluationLoader", "Loader", "build_eval_loader", "build_loader", "open_source"]


class Loader(Protocol):
    """What training sees of a loader."""

    num_images: int
    steps_per_epoch: int
    broken: list[tuple[str, str]]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[torch.Tensor]: ...

    def close(self) -> None: ...


def open_source(settings: DataSettings) -> ImageSource:
    """The images that the settings name: a folder, or the drawn set (drawn now, if it is not in the cache)."""
    if settings.dataset == "shapes":
        return FolderSource(find_shapes() / "train")
    if not settings.root_path and not settings.image_folder:
        raise DataError("no images are named: set data.root_path and data.image_folder, or data.dataset: shapes")
    return FolderSource(settings.path)


def build_loader(
    settings: DataSettings,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """The training loader of a rank. Batches are uint8 [batch_size,3,H,W], pinned when the device is CUDA.

    Raises DataError when there are no images, or fewer than a global batch.
    """
    source = open_source(settings)
    global_batch = settings.batch_size * world_size
    if len(source) < global_batch:
        raise DataError(
            f"the batch is larger than the data set: {settings.batch_size} images x {world_size} processes = "
            f"{global_batch}, but there are {len(source)} images; lower data.batch_size"
        )
    pin_memory = settings.pin_mem and torch.device(device).type == "cuda"
    return TorchvisionLoader(source, settings, seed=seed, rank=rank, world_size=world_size, pin_memory=pin_memory)


def build_eval_loader(
    source: str | os.PathLike[str] | ImageSource,
    image_size: int | tuple[int, int],
    batch_size: int,
    *,
    num_workers: int = 0,
) -> EvaluationLoader:
    """All images once, in order, for measuring features.

    source: a folder, "shapes:train" or "shapes:val" for the drawn set, or an opened source.
    """
    if isinstance(source, str) and source in ("shapes:train", "shapes:val"):
        source = FolderSource(find_shapes() / source.split(":")[1])
    elif isinstance(source, (str, os.PathLike)):
        source = FolderSource(source)
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    return EvaluationLoader(source, size, batch_size, num_workers=num_workers)
