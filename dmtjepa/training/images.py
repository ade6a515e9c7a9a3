"""A resumed run trains on the same images, in the same order, loaded in the same way, or says what has changed."""

from __future__ import annotations

import logging
from pathlib import Path

from dmtjepa.checkpoint_format import CheckpointError, read_meta
from dmtjepa.config import Config
from dmtjepa.data import ImageSource
from dmtjepa.data.fingerprint import Fingerprint, ImageList, describe_change
from dmtjepa.run_folder import RunFolder

logger = logging.getLogger(__name__)


def check_images(
    config: Config, folder: RunFolder, source: ImageSource, loader: str, checkpoint: Path | None
) -> Fingerprint:
    """The fingerprint of the images of this start, compared with that of the checkpoint to resume from.

    Args:
        loader: name of the loader that reads the images.
        checkpoint: None for a new run.

    Raises:
        CheckpointError: they differ, and `data.allow_changed` is not set.
    """
    images = ImageList.of(source)
    if checkpoint is not None:
        compare_images(config, folder, images, loader, checkpoint)
    return images.fingerprint(loader)


def compare_images(config: Config, folder: RunFolder, images: ImageList, loader: str | None, checkpoint: Path) -> None:
    """Compare images and loader with those of a checkpoint. One that is older than fingerprints is accepted.

    Args:
        loader: name of the loader that reads the images; None if it is not known, and not compared.

    Raises:
        CheckpointError: they differ, and `data.allow_changed` is not set.
    """
    recorded = read_meta(checkpoint).get("images")
    if recorded is None:
        return
    try:
        earlier = Fingerprint(**recorded)
    except TypeError as error:
        raise CheckpointError(f"{checkpoint}: its description of the images cannot be read: {error}") from None
    loader = loader or earlier.loader
    now = images.fingerprint(loader)
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
