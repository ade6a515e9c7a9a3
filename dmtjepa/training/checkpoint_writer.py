"""Writing checkpoints: by all ranks, in the background, renamed to their final name when everything is on disk."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dmtjepa.checkpoint_format import (
    FORMAT,
    MANIFEST,
    META,
    TENSORS,
    CheckpointError,
    describe_file,
    discard,
    name_of,
    prune,
    root_cause,
)
from dmtjepa.files import WRITING, sync_folder, write_json

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints into `folder` one at a time, in a thread on every rank.

    Args:
        folder: where `step-{n}` folders go, within the folder of the run; shared by all ranks.
        group: a gloo process group of all ranks that nothing else uses.
        keep_last: newest checkpoints that are kept; those whose meta says `keep` are never removed.
        device: where the state is.
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup, keep_last: int, device: torch.device) -> None:
        self._folder, self._group, self._keep_last = folder, group, keep_last
        self._rank = dist.get_rank(group)
        self._stager = BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")  # in pinned memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, state: Mapping[str, Tensor], meta: Mapping[str, Any], then: Callable[[Path], None] | None = None
    ) -> None:
        """Copy `state` to host memory and write it in the background, as the checkpoint of `meta["step"]`.

        Waits first for the previous one. `then(folder)` runs on rank 0 when the checkpoint is complete (for exports).

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        staged = self._stager.stage(dict(state))
        self._pending = self._thread.submit(self._write, staged, dict(meta), then)

    def run_after(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0, in the background, when the last checkpoint is complete.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self.wait()
        if self._rank == 0:
            self._pending = self._thread.submit(work)

    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed; never waits."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def wait_after_failure(self, seconds: float) -> None:
        """Wait at most `seconds` for the last checkpoint, because training has failed. Its own failure is logged."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result(seconds)
        except TimeoutError:
            logger.warning("the checkpoint that is being written was not complete after %g s and is abandoned", seconds)
        except Exception as error:
            logger.warning("the checkpoint that was being written is lost, too: %s", error)

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _write(self, state: dict[str, Tensor], meta: dict[str, Any], then: Callable[[Path], None] | None) -> None:
        final = self._folder / name_of(meta["step"])
        writing = self._folder / f"{WRITING}{final.name}"
        try:
            self._on_rank_0(lambda: _prepare(writing))
            # PyTorch 2.10 says this of its own code, in the middle of a run.
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            # Copies ahead are for tensors on a GPU. These are on the host, and to look for more would make this thread
            # wait for the stream that trains, and open a context on the first GPU on every rank.
            writer = dcp.FileSystemWriter(writing, sync_files=True, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self._group)
            self._hash_and_rename(writing, final, meta)
        except (dcp.CheckpointException, OSError, RuntimeError) as error:
            if self._rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {meta['step']} could not be written to {self._folder} (is the disk full?); "
                f"earlier checkpoints are untouched: {root_cause(error)}"
            ) from error
        if self._rank == 0:
            prune(final, self._keep_last)
            if then is not None:
                then(final)

    def _hash_and_rename(self, writing: Path, final: Path, meta: dict[str, Any]) -> None:
        """Hash the files in parallel, each rank those it wrote; rank 0 writes the manifest and renames."""
        try:
            mine: dict[str, Any] | str = {path.name: describe_file(path) for path in writing.glob(f"__{self._rank}_*")}
        except OSError as error:
            mine = f"rank {self._rank}: {error}"
        described: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(described, mine, group=self._group)
        faults = [part for part in described if isinstance(part, str)]
        if faults:
            raise OSError("; ".join(faults))

        def complete() -> None:
            files = {name: row for part in described for name, row in part.items()}
            _check_shared(writing, files)
            write_json(writing / META, meta)
            files |= {name: describe_file(writing / name) for name in (TENSORS, META)}
            write_json(writing / MANIFEST, {"format": FORMAT, "step": meta["step"], "files": files})
            sync_folder(writing)
            if final.exists():  # the same step once more, after a resume from an earlier one
                discard(final)
            os.rename(writing, final)
            sync_folder(self._folder)

        self._on_rank_0(complete)

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 while the others wait; its failure is raised on all."""
        outcome: list[str | None] = [None]
        if self._rank == 0:
            try:
                work()
            except OSError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise OSError(outcome[0])


def _check_shared(writing: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint whose parts are on several disks: it could not be read again. Raises OSError."""
    missing = [name for name, row in files.items() if not _has_size(writing / name, row["bytes"])]
    if missing:
        raise OSError(
            f"rank 0 does not see {missing[0]}, which another rank has written; all nodes must share {writing.parent}"
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _prepare(writing: Path) -> None:
    """Make the folder that is written into. A run folder that was removed is not made again: it would lack the rest."""
    run_folder = writing.parent.parent
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder} (logging.folder) is gone")
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(exist_ok=True)
    writing.mkdir()
