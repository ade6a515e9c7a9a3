"""A resumed run trains on the same images, in the same order, loaded in the same way, or says what has changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmtjepa.checkpoint_format import CheckpointError, read_meta
from dmtjepa.config import Config
from dmtjepa.data import ImageSource
from dmtjepa.data.fingerprint import Fingerprint, ImageList, describe_change
from dmtjepa.run_folder import RunFolder

logger = logging.getLogger(__name__)


def check_steps_per_epoch(checkpoint: Path, meta: Mapping[str, Any], steps_per_epoch: int, num_images: int) -> None:
    """Refuse a checkpoint whose epochs have another number of steps.

    Raises:
        CheckpointError: with both numbers.
    """
    if meta["steps_per_epoch"] != steps_per_epoch:
        raise CheckpointError(
            f"{checkpoint} counts {meta['steps_per_epoch']} steps per epoch of {meta['num_images']} images, and "
            f"this run {steps_per_epoch} of {num_images}: the data set has changed. Restore it, or choose another "
            "logging.folder and start from the weights (meta.read_checkpoint)"
        )


def check_images(
    config: Config, folder: RunFolder, source: ImageSource, loader: str, checkpoint: Path | None
) -> Fingerprint:
    """The fingerprint of the images of this start, compared with that of the checkpoint to resume from.

    Args:
        loader: name of the loader that reads the images.
        checkpoint: None for a new run. One that is older than fingerprints is accepted.

    Raises:
        CheckpointError: they differ, and `data.allow_changed` is not set.
    """
    images = ImageList.of(source)
    now = images.fingerprint(loader)
    recorded = read_meta(checkpoint).get("images") if checkpoint is not None else None
    if recorded is None:
        return now
    try:
        earlier = Fingerprint(**recorded)
    except TypeError as error:
        raise CheckpointError(f"{checkpoint}: its description of the images cannot be read: {error}") from None
    if earlier.loader == "torchvision":  # its name in earlier versions
        earlier = replace(earlier, loader="pil")
    changes = []
    if (earlier.names, earlier.sizes) != (now.names, now.sizes):
        changes.append(f"the images: {_describe(folder, earlier, images)}")
    if earlier.loader != loader:
        changes.append(f"the loader: {earlier.loader} there, {loader} now, with other crops and pixels (data.loader)")
    text = "; ".join(changes)
    if changes and not config.data.allow_changed:
        raise CheckpointError(
            f"{checkpoint} was trained with other data. What has changed is {text}. Restore it, or set "
            "data.allow_changed: true to go on with the data as they are"
        )
    if changes:
        logger.warning("data.allow_changed: the run goes on with other data. What has changed is %s", text)
    return now


def record_images(folder: RunFolder, source: ImageSource, now: Fingerprint) -> None:
    """Keep the list of the images in the run folder, from which a later start tells what has changed."""
    kept = ImageList.read(folder.image_list)
    if kept is None or kept.fingerprint(now.loader) != now:
        ImageList.of(source).write(folder.image_list)


def _describe(folder: RunFolder, earlier: Fingerprint, images: ImageList) -> str:
    kept = ImageList.read(folder.image_list)
    if kept is not None and kept.fingerprint(earlier.loader) == earlier:
        return describe_change(kept, images)
    return f"{earlier.num_images} there, {len(images.names)} now; {folder.image_list.name} does not tell which differ"
