"""Reading the tensors of a checkpoint folder as data: nothing in the folder is run.

torch.distributed.checkpoint stores its `.metadata` as a pickle, which can name any function to call, and reads values
other than tensors without `weights_only`. A checkpoint of this project holds tensors alone. So the reader here admits
the classes that describe tensors and refuses everything else.
"""

from __future__ import annotations

import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dmtjepa.errors import UserError

# Global names that torch.distributed.checkpoint writes. Calling them has no effect but to make the object.
ADMITTED: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        pathlib.PosixPath,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # written by Python 3.13
}
TENSOR_FILE = re.compile(r"__\d+_\d+\.distcp")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read; the message names the folder and the remedy."""


class TensorReader(dcp.FileSystemReader):
    """Reads a checkpoint folder for `torch.distributed.checkpoint.load`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata_file = folder / ".metadata"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and places of the tensors.

        Raises:
            CheckpointError: the file cannot be read, or holds anything else.
        """
        try:
            with self._metadata_file.open("rb") as file:
                loaded = _MetadataUnpickler(file).load()
            _check_metadata(loaded)
        except _Foreign as reason:
            raise CheckpointError(f"{self._metadata_file} {reason}. The checkpoint was not read") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{self._metadata_file} cannot be read: {type(error).__name__}: {error}") from error
        if loaded.storage_meta is None:
            loaded.storage_meta = StorageMeta()
        loaded.storage_meta.load_id = self.load_id
        return loaded


class _Foreign(Exception):
    """What a checkpoint must not hold, as part of a sentence."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the objects of `ADMITTED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Foreign(f"names {module}.{name}, which does not belong in a checkpoint")


def _check_metadata(loaded: Any) -> None:
    """Refuse what the reader of torch.distributed.checkpoint would load as a pickle, or from outside of the folder."""
    if not isinstance(loaded, Metadata):
        raise _Foreign(f"holds a {type(loaded).__name__}")
    for name, row in loaded.state_dict_metadata.items():
        if not isinstance(row, TensorStorageMetadata):
            raise _Foreign(f"says that {name} is a {type(row).__name__}, not a tensor")
    for place in loaded.storage_data.values():
        if not TENSOR_FILE.fullmatch(place.relative_path):
            raise _Foreign(f"names the file {place.relative_path}")
        if getattr(place, "transform_descriptors", None):
            raise _Foreign(f"names the transformation {place.transform_descriptors}")
