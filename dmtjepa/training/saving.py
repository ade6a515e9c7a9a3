"""When a run saves, and what: checkpoints, and the official files that are exported from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmtjepa.config import Config
from dmtjepa.files import link_or_copy
from dmtjepa.interop import export_checkpoint
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.checkpoint_writer import CheckpointWriter
from dmtjepa.training.distributed import DistributedError, World, new_gloo_group
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.state import TrainingState


class Saver:
    """Writes checkpoints of a run into its folder, in the background.

    Args:
        config, world, schedules: of the run.
        folder: of the run.
        state: what is saved.
    """

    def __init__(
        self, config: Config, world: World, folder: RunFolder, schedules: Schedules, state: TrainingState
    ) -> None:
        self._config, self._world, self._folder, self._schedules, self._state = config, world, folder, schedules, state
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
        then = (lambda checkpoint: _export(checkpoint, paths)) if paths else None
        self._writer.save(self._state.tensors(), self._state.meta(keep=keep), then)

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


def _export(checkpoint: Path, paths: list[Path]) -> None:
    """Export to the first path, and link or copy that file to the others."""
    first, *others = paths
    export_checkpoint(checkpoint, first)
    for path in others:
        link_or_copy(first, path)
