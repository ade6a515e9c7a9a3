"""The format of checkpoints: find, verify, read and remove them. Needs no training.

A checkpoint is a folder `step-{n}` that holds n finished steps:

    *.distcp, .metadata   the tensors, by torch.distributed.checkpoint
    meta.json             plain values: step, epoch, settings, ...
    manifest.json         size and SHA-256 of every other file

It is written as `.writing-step-{n}` and renamed when all files are on disk, the manifest last. So a folder with the
final name is whole, unless the storage lost something; the manifest shows that, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dmtjepa.checkpoint_reader import CheckpointError, TensorReader
from dmtjepa.files import WRITING

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "checkpoints"
"""Name of the folder of a run that holds its checkpoints."""
MANIFEST, META, TENSORS = "manifest.json", "meta.json", ".metadata"
REMOVING = ".removing-"


class _Fault(Exception):
    """What is wrong with a checkpoint, as part of a sentence."""


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return folder.name.startswith("step-") and folder.name.removeprefix("step-").isdecimal()


def step_of(folder: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first. They are not verified."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and is_checkpoint(path)]
    return sorted(found, key=step_of, reverse=True)


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one. Reads and hashes all its files."""
    try:
        files = _read_manifest(checkpoint)
        for name, row in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != row["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {row['bytes']}"
            if describe_file(path)["sha256"] != row["sha256"]:
                return f"{name} has other contents than were written"
    except (OSError, _Fault) as fault:
        return str(fault)
    return None


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file by its name.

    Raises:
        _Fault: the manifest is missing or malformed, of another format or of another checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        raise _Fault(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise _Fault(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise _Fault(f"its {MANIFEST} cannot be read (it holds a {type(manifest).__name__})")
    if manifest.get("format") != FORMAT:
        raise _Fault(f"its format is {manifest.get('format')}, and this version reads {FORMAT}")
    if manifest.get("step") != step_of(checkpoint):
        raise _Fault(f"its name says step {step_of(checkpoint)} and its manifest step {manifest.get('step')}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {TENSORS, META} <= files.keys() or not all(map(_is_entry, files.items())):
        raise _Fault(f"its {MANIFEST} cannot be read (the list of files is malformed)")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, row = item
    return Path(name).name == name and isinstance(row, dict) and {"bytes", "sha256"} <= row.keys()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint without fault, or None if there is no checkpoint. Skips damaged ones with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    faults = []
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged and skipped: %s", checkpoint, fault)
        faults.append(f"  {checkpoint.name}: {fault}")
    if faults:
        raise CheckpointError(
            "\n".join(
                [
                    f"all checkpoints in {folder} are damaged; nothing was changed:",
                    *faults,
                    "Restore one of them from a copy. To train from the start, choose another logging.folder or remove "
                    "this one",
                ]
            )
        )
    return None


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest whole one in a run folder or its `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    if is_checkpoint(folder):
        return folder
    found = newest_whole(folder if folder.name == FOLDER else folder / FOLDER)
    if found is None:
        what = "holds no checkpoint" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give a run folder or a checkpoints/step-N folder")
    return found


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        meta = json.loads((checkpoint / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / META} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{checkpoint / META} holds a {type(meta).__name__}, not a dictionary")
    return meta


def tensor_names(checkpoint: Path) -> set[str]:
    """The names of the tensors of a checkpoint, which are not read.

    Raises:
        CheckpointError: the folder cannot be read, or holds anything but tensors.
    """
    return set(TensorReader(checkpoint).read_metadata().state_dict_metadata)


def check_fits(checkpoint: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Check that a checkpoint has tensors of these names and shapes, without reading them.

    Raises:
        CheckpointError: one is missing or has another shape, or the folder holds anything but tensors.
    """
    rows: dict[str, Any] = TensorReader(checkpoint).read_metadata().state_dict_metadata
    for name, shape in shapes.items():
        found = "is missing" if name not in rows else f"is {list(rows[name].size)} instead of {list(shape)}"
        if name not in rows or rows[name].size != shape:
            raise CheckpointError(f"{checkpoint} does not fit this run: {name} {found}")


def load_into(state: dict[str, Tensor], checkpoint: Path) -> None:
    """Read a checkpoint into the tensors of `state`, in place. Any number of ranks may have written it.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the folder holds anything but tensors.
    """
    reader = TensorReader(checkpoint)
    reader.read_metadata()  # raises the error itself; from within `load` it would be wrapped
    try:
        dcp.load(state, storage_reader=reader)
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {root_cause(error)}") from error


def load_full(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole and on the CPU. Needs no process group.

    Raises:
        CheckpointError: the folder cannot be read, or holds anything but tensors.
    """
    reader = TensorReader(checkpoint)
    rows: dict[str, Any] = reader.read_metadata().state_dict_metadata  # TensorReader has checked the types
    try:
        state = {
            name: torch.empty(row.size, dtype=row.properties.dtype)
            for name, row in rows.items()
            if isinstance(row, TensorStorageMetadata)  # the reader admits no others
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended here
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {root_cause(error)}") from error
    return state


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. A crash midway does not leave a part of it under its name."""
    trash = checkpoint.with_name(f"{REMOVING}{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(written: Path, keep_last: int) -> None:
    """Remove old checkpoints after `written` was written.

    Keeps the newest `keep_last`, of which `written` is one, and those that are kept for good. Those of later steps are
    damaged: the run has resumed from an earlier one. They stay until the run has passed them.
    """
    earlier = [checkpoint for checkpoint in list_checkpoints(written.parent) if step_of(checkpoint) < step_of(written)]
    for checkpoint in earlier[max(0, keep_last - 1) :]:
        with contextlib.suppress(CheckpointError):
            if read_meta(checkpoint).get("keep"):
                continue
        discard(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in [*folder.glob(f"{WRITING}*"), *folder.glob(f"{REMOVING}*")]:
        shutil.rmtree(path, ignore_errors=True)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as in the manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def root_cause(error: BaseException) -> str:
    """The first line that says why; torch.distributed.checkpoint wraps the failures of all ranks."""
    if isinstance(error, dcp.CheckpointException):
        causes = {f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items()}
        return "; ".join(sorted(causes))
    return str(error)
