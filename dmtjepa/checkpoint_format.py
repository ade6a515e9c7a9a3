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
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dmtjepa.errors import UserError
from dmtjepa.files import WRITING

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "checkpoints"
"""Of a run, where its checkpoints are."""
MANIFEST, META, TENSORS = "manifest.json", "meta.json", ".metadata"
REMOVING = ".removing-"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read; the message names the folder and the remedy."""


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return folder.name.startswith("step-") and folder.name.removeprefix("step-").isdigit()


def step_of(folder: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints in `folder`, newest first; not yet verified."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and is_checkpoint(path)]
    return sorted(found, key=step_of, reverse=True)


def find_fault(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one. `hashes=False` compares sizes only."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files, form = manifest["files"], manifest["format"]
    except FileNotFoundError:
        return "it has no manifest.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({error})"
    if form != FORMAT:
        return f"its format is {form}, and this version reads {FORMAT}"
    if manifest.get("step") != step_of(checkpoint):
        return f"its name says step {step_of(checkpoint)} and its manifest step {manifest.get('step')}"
    for name, row in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != row["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {row['bytes']}"
        if hashes and describe_file(path)["sha256"] != row["sha256"]:
            return f"{name} has other contents than were written"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint without fault, or None; damaged ones are passed over with a warning."""
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged and passed over: %s", checkpoint, fault)
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
        raise CheckpointError(f"{folder}: no whole checkpoint")
    return found


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads((checkpoint / META).read_text())


def load_into(state: dict[str, Tensor], checkpoint: Path) -> None:
    """Read a checkpoint into the tensors of `state`, in place, whatever number of ranks wrote it.

    Raises CheckpointError where a tensor is missing or has another shape.
    """
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
    except (dcp.CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {root_cause(error)}") from error


def load_full(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole and on the CPU, without any process group."""
    reader = dcp.FileSystemReader(checkpoint)
    rows = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(row.size, dtype=row.properties.dtype)
        for name, row in rows.items()
        if isinstance(row, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint such that a crash midway leaves no torn one under its name."""
    trash = checkpoint.with_name(f"{REMOVING}{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those that are kept for good."""
    for checkpoint in list_checkpoints(folder)[keep_last:]:
        with contextlib.suppress(OSError, ValueError):
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
