"""Images from disk to batches of uint8 crops; normalisation happens in the patch embedding."""

from dmtjepa.data.build import (
    build_eval_loader,
    build_loader,
    check_batch_fits,
    check_loader,
    is_dali_installed,
    open_images,
    open_source,
)
from dmtjepa.data.loaders.base import Loader
from dmtjepa.data.loaders.center_crop import EvaluationLoader
from dmtjepa.data.sources.base import DataError, ImageSource, StoredSource
from dmtjepa.data.sources.folder import FolderSource

__all__ = [
    "DataError",
    "EvaluationLoader",
    "FolderSource",
    "ImageSource",
    "Loader",
    "StoredSource",
    "build_eval_loader",
    "build_loader",
    "check_batch_fits",
    "check_loader",
    "is_dali_installed",
    "open_images",
    "open_source",
]
