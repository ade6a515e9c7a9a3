"""What happens when a run collapses: `runtime.on_collapse`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from dmtjepa.checkpoint_format import discard, list_checkpoints, step_of
from dmtjepa.config import Config
from dmtjepa.config.settings import PatchSettings
from dmtjepa.errors import UserError
from dmtjepa.evaluation.verdict import Finding, Row, find_collapse, select_looks, shows_collapse
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.distributed import World, run_on_rank_0
from dmtjepa.training.metrics import StepValues
from dmtjepa.training.saving import Saver
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.vote import Vote

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
"""A run that collapses once more is stopped."""
LR_FACTOR = 0.5
"""Each rollback multiplies the learning rate by this. With the same one, the run would collapse again."""


class CollapsedRun(UserError, RuntimeError):
    """A run that was stopped because it had collapsed; the message names signs, remedy and checkpoints."""


class CollapseWatch:
    """Judges each look on rank 0, and makes all ranks act on what it finds.

    Args:
        config, world: of the run.
        folder, saver: of the run.
        first_step: number of steps that are done.
    """

    def __init__(self, config: Config, world: World, folder: RunFolder, saver: Saver, *, first_step: int) -> None:
        self._action, self._world, self._folder, self._saver = config.runtime.on_collapse, world, folder, saver
        self._patch = config.patch
        rows = folder.read_metrics() if world.rank == 0 else []
        self._looks = select_looks(rows)
        self._largest_step: Row = max(rows, key=_update_norm, default={})
        self._finding: Finding | None = None
        self._stopping = False
        self._last_good = first_step  # number of steps
        if self._looks and shows_collapse(self._looks[-1], self._patch):  # an earlier start has ended amid a collapse
            self._last_good = _find_last_good(self._looks, self._patch)

    def look(self, steps: list[StepValues]) -> None:
        """Judge what `Metrics.flush` has returned. Only rank 0 has the figures of a look."""
        for value in steps:
            record = value.record
            schedules = {"train/lr": record.learning_rate, "train/weight_decay": record.weight_decay}
            row = {"step": record.step} | schedules | value.figures
            self._largest_step = max(self._largest_step, row, key=_update_norm)
            if "features/mean_cosine" not in value.figures or self._finding is not None:
                continue
            self._looks.append(row)
            found = find_collapse(self._looks, self._patch, [self._largest_step])
            if found is not None:
                self._finding = found
                logger.warning("%s. %s", found.text, found.remedy)
            elif not shows_collapse(self._looks[-1], self._patch):
                self._last_good = value.record.step + 1

    @property
    def vote(self) -> Vote:
        """What this rank wants to do next."""
        return Vote.CONTINUE if self._finding is None or self._action == "warn" else Vote.COLLAPSED

    def rolls_back(self) -> bool:
        """Whether the run is to go on from an earlier checkpoint. The answer and its effect are those of rank 0.

        Call it on all ranks after a decision of `Vote.COLLAPSED`. Later checkpoints are removed; training then has to
        start again.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        if self._action == "rollback":
            self._saver.wait()
            self._stopping = not run_on_rank_0(self._world, self._roll_back)
        else:
            self._stopping = True
        return not self._stopping

    def _roll_back(self) -> bool:
        folder, rollbacks = self._folder, self._folder.read_rollbacks()
        checkpoints = list_checkpoints(folder.checkpoints)
        good = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) <= self._last_good]
        if not good or len(rollbacks) >= MAX_ROLLBACKS:
            return False
        step = step_of(good[0])
        assert self._finding is not None
        rollbacks.append({"from_step": self._looks[-1]["step"] + 1, "to_step": step, "finding": self._finding.text})
        for checkpoint in checkpoints:  # the newest first: a start after a kill finds the collapse again
            if step_of(checkpoint) > step:
                discard(checkpoint)
        folder.write_rollbacks(rollbacks)
        folder.latest_export.unlink(missing_ok=True)  # the next start exports the newest checkpoint
        logger.warning(
            "runtime.on_collapse: rollback %d of at most %d: back to step %d, at which nothing was wrong yet. From "
            "there on the learning rate is %g times that of the settings",
            len(rollbacks), MAX_ROLLBACKS, step, LR_FACTOR ** len(rollbacks),
        )  # fmt: skip
        return True

    def finish(self) -> None:
        """Call this on all ranks when everything is saved.

        Raises:
            CollapsedRun: the run ends because it has collapsed; with the finding of rank 0.
        """
        if self._stopping:
            raise CollapsedRun(run_on_rank_0(self._world, self._explain))

    def _explain(self) -> str:
        assert self._finding is not None
        reason = ""
        if self._action == "rollback":
            reason = (
                f" There is no checkpoint of step {self._last_good} or earlier to go back to (raise "
                f"runtime.keep_last), or the run was rolled back {MAX_ROLLBACKS} times."
            )
        return (
            f"{self._finding.text}. {self._finding.remedy}. The run was saved and stopped (runtime.on_collapse: "
            f"{self._action}).{reason} To train on from its state, start it again with runtime.on_collapse: warn"
        )


def _find_last_good(looks: Sequence[Row], patch: PatchSettings) -> int:
    """The number of steps at the last look at which nothing was wrong; 0 without one."""
    return max((look["step"] + 1 for look in looks if not shows_collapse(look, patch)), default=0)


def _update_norm(row: Row) -> float:
    return row.get("train/update_norm") or 0.0


def slow_down(schedules: Schedules, num_rollbacks: int) -> Schedules:
    """The schedules of a run that was rolled back: the learning rate is lower by `LR_FACTOR` for each time."""
    factor = LR_FACTOR**num_rollbacks
    return dataclasses.replace(
        schedules, start_lr=factor * schedules.start_lr, lr=factor * schedules.lr, final_lr=factor * schedules.final_lr
    )
