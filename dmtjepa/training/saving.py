"""When a run saves, and what: checkpoints, and the official files that are exported from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dmtjepa.checkpoint_format import CheckpointError, find_fault, list_checkpoints, read_meta
from dmtjepa.config import Config
from dmtjepa.files import link_or_copy
from dmtjepa.interop import WeightsError, export_checkpoint, read_checkpoint
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.checkpoint_writer import CheckpointWriter
from dmtjepa.training.distributed import DistributedError, World, new_gloo_group
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.state import TrainingState

logger = logging.getLogger(__name__)

FAILURE_WAIT = 300.0
"""After a failure of training, seconds to wait for the checkpoint that is being written."""


class Saver:
    """Writes checkpoints of a run into its folder, in the background.

    Args:
        config, world, schedules: of the run.
        folder: of the run.
        state: what is saved.
        signals: of the run. Before a job is requeued, nothing is exported: the next start makes up for it.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        schedules: Schedules,
        state: TrainingState,
        signals: StopSignals,
    ) -> None:
        self._config, self._world, self._folder, self._schedules, self._state = config, world, folder, schedules, state
        self._signals = signals
        self._writer = CheckpointWriter(
            folder.checkpoints, new_gloo_group(world), config.runtime.keep_last, world.device
        )

    def is_due(self) -> bool:
        """Whether the settings ask for a checkpoint of the current step."""
        runtime, step = self._config.runtime, self._state.step
        if step == self._schedules.num_steps:
            return True
        if runtime.save_every_steps is not None and step % runtime.save_every_steps == 0:
            return True
        return step % (self._schedules.steps_per_epoch * runtime.save_every_epochs) == 0

    def save(self) -> None:
        """Write the current state in the background.

        At the end of an epoch, export it as `{tag}-latest.pth.tar`, and as `{tag}-ep{N}.pth.tar` where it is kept.
        """
        epoch, step_in_epoch = divmod(self._state.step, self._schedules.steps_per_epoch)
        epoch_done = step_in_epoch == 0
        last = self._state.step == self._schedules.num_steps
        keep = epoch_done and (epoch % self._config.runtime.keep_every_epochs == 0 or last)
        paths = [self._folder.latest_export] * epoch_done + [self._folder.epoch_export(epoch)] * keep

        def export(checkpoint: Path) -> None:
            if paths and not self._leaves_exports():
                _export(checkpoint, paths)

        self._writer.save(self._state.tensors(), self._state.meta(keep=keep), export)

    def _leaves_exports(self) -> bool:
        """Whether the next start makes the exports. After the last step, there may be none."""
        return self._signals.in_haste and self._state.step < self._schedules.num_steps

    def export_missing(self) -> None:
        """Export in the background what whole checkpoints should have and lack, because a start was killed.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self._writer.run_after(lambda: None if self._leaves_exports() else export_missing(self._folder))

    def save_not_finite(self, steps: list[dict[str, Any]]) -> Path:
        """Write the current state and a description of the steps into `not_finite/`, and wait. Returns that folder."""
        self._writer.wait()
        folder = self._folder.not_finite
        writer = CheckpointWriter(folder, new_gloo_group(self._world), keep_last=1, device=self._world.device)
        writer.save(self._state.tensors(), self._state.meta(keep=False))
        writer.close()
        if self._world.rank == 0:
            self._folder.write_not_finite(steps)
        return folder

    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed. Never waits."""
        return self._writer.failed()

    def raise_failure(self) -> None:
        """Raise after a vote of `Vote.FAIL`: the error of this rank, or DistributedError for another rank's."""
        self._writer.wait()
        raise DistributedError("another rank could not write its part of a checkpoint; see its log")

    def wait(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self._writer.wait()

    def wait_after_failure(self, kind: type[BaseException] | None, *_: object) -> None:
        """For `ExitStack.push`: after an exception, wait a while for the checkpoint that is being written."""
        if kind is not None and issubclass(kind, Exception):
            self._writer.wait_after_failure(FAILURE_WAIT)


def export_missing(folder: RunFolder) -> None:
    """Export what whole checkpoints of a run should have and lack.

    That is `{tag}-latest.pth.tar` of the newest checkpoint that ends an epoch, and `{tag}-ep{N}.pth.tar` of each one
    that is kept. Files that cannot be read count as missing.

    Raises:
        CheckpointError: a file could not be written.
    """
    latest = [folder.latest_export]
    for checkpoint in list_checkpoints(folder.checkpoints):
        try:
            meta = read_meta(checkpoint)
        except CheckpointError:
            continue
        if meta.get("step_in_epoch") != 0:
            continue
        paths = latest + [folder.epoch_export(meta["epoch"])] * bool(meta.get("keep"))
        paths = [path for path in paths if not _is_exported(path, meta["step"])]
        if paths:
            fault = find_fault(checkpoint)
            if fault is not None:
                logger.warning("checkpoint %s is damaged and not exported: %s", checkpoint, fault)
                continue
            logger.info("exporting %s, whose %s is missing", checkpoint, " and ".join(path.name for path in paths))
            _export(checkpoint, paths)
        latest = []


def _is_exported(path: Path, step: int) -> bool:
    """Whether a file holds the state after `step` steps, or a later one."""
    try:
        return path.is_file() and read_checkpoint(path).get("step", step) >= step
    except WeightsError:
        return False


def _export(checkpoint: Path, paths: list[Path]) -> None:
    """Export to the first path, and link or copy that file to the others.

    Raises:
        CheckpointError: a file could not be written.
    """
    first, *others = paths
    try:
        export_checkpoint(checkpoint, first)
        for path in others:
            link_or_copy(first, path)
    except WeightsError as error:  # what becomes of the run is decided by its loss
        logger.warning("not exported: %s", error)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint} was written and is gone: was the run folder (logging.folder) removed or renamed?"
            ) from error
        raise CheckpointError(
            f"{checkpoint} is complete, but its export failed (is the disk full?): {error}. The next start makes it"
        ) from error
