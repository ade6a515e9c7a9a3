"""The folder of a run: the name and format of every file in it.

    config.yaml                  the settings, as resolved at the last start
    environment.json             of each start: command, commit, versions, hardware, and the settings that it changed
    {tag}_r{rank}.csv            losses and times of each rank, see `dmtjepa.step_csv`
    metrics.jsonl                what else is measured during training, see `dmtjepa.metrics_file`
    images.gz                    the names of the images, and some sizes, see `dmtjepa.data.fingerprint`
    tensorboard/                 the same, of rank 0, and schedules and speed
    checkpoints/step-{n}/        complete states, see `dmtjepa.checkpoint_format`
    {tag}-latest.pth.tar         the newest epoch in the official layout, see `dmtjepa.interop.official`
    {tag}-ep{N}.pth.tar          the state after N epochs in the official layout, kept
    logger_ids.json              the names that W&B and MLflow have for the run (`logging.loggers`)
    wandb/                       what W&B writes
    rollbacks.json               how often a collapsed run went back to an earlier checkpoint (`runtime.on_collapse`)
    {tag}-best.pth.tar           the encoders of the best evaluation during training (evaluation.keep_best)
    not_finite/                  the state after a loss that was not finite: a checkpoint, and steps.json
    report/                      what `dmtjepa evaluate` writes: report.html, report.md, report.json and figures
    .lock                        held while a run writes into the folder, and names its process

`tag` is `logging.write_tag`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch

from dmtjepa.checkpoint_format import FOLDER, is_checkpoint, list_checkpoints, remove_leftovers
from dmtjepa.config import Config, ConfigError, changed_settings, different_settings, load_config
from dmtjepa.environment import TIME_FORMAT, describe_environment
from dmtjepa.errors import UserError
from dmtjepa.files import WRITING, check_writable, write_atomically, write_json
from dmtjepa.metrics_file import MetricsFile, read_metrics
from dmtjepa.processes import private_descriptor
from dmtjepa.step_csv import LossCurve, StepCsv, has_rows, read_losses

logger = logging.getLogger(__name__)


class RunFolderError(UserError, ValueError):
    """A folder that is not a run, or is the folder of another run. Nothing in it was changed."""


LOCK = ".lock"
_LOCK_TRIES, _LOCK_SECONDS = 16, 20
PAGE = "report.html"
"""Name of the page in the folder of a report."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Args:
        path: the folder (`logging.folder`).
        tag: first part of file names (`logging.write_tag`).
    """

    path: Path
    tag: str

    @classmethod
    def from_config(cls, config: Config) -> RunFolder:
        """The folder that the settings name. It need not exist."""
        return cls(config.logging.path, config.logging.write_tag)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / FOLDER

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def not_finite(self) -> Path:
        return self.path / "not_finite"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def report_file(self) -> Path:
        """The numbers of the report, for programs."""
        return self.report / "report.json"

    @property
    def latest_export(self) -> Path:
        return self.path / f"{self.tag}-latest.pth.tar"

    @property
    def best_export(self) -> Path:
        return self.path / f"{self.tag}-best.pth.tar"

    def epoch_export(self, num_epochs: int) -> Path:
        """The file of the state after `num_epochs` epochs."""
        return self.path / f"{self.tag}-ep{num_epochs}.pth.tar"

    def holds(self, weights: Path) -> bool:
        """Whether weights are the run's: a checkpoint, or a file with one of the names of its exports."""
        folder, name = weights.parent.resolve(), weights.name
        if folder == self.checkpoints.resolve():
            return is_checkpoint(weights)
        is_export = re.fullmatch(rf"{re.escape(self.tag)}-(latest|best|ep\d+)\.pth\.tar", name)
        return folder == self.path.resolve() and is_export is not None

    @property
    def image_list(self) -> Path:
        return self.path / "images.gz"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def csv_file(self, rank: int) -> Path:
        return self.path / f"{self.tag}_r{rank}.csv"

    # ---- Before a run starts

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, which is created if it is missing, against a second run that would write into it.

        File systems without locks are not protected. A job that SLURM has requeued waits for minutes: the server of a
        network file system frees the lock of a lost node late.

        Raises:
            RunFolderError: another process holds the lock, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a")
        except OSError as error:
            raise RunFolderError(f"{self.path} (logging.folder) cannot be written to: {error}") from None
        with file:
            requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
            if _lock(file, fcntl.LOCK_EX, self.path, _LOCK_TRIES if requeued else 1):
                _name_holder(file)
            with private_descriptor(file.fileno()):
                yield

    def has_trained(self) -> bool:
        """Whether the folder holds the outcome of a step: a checkpoint, an export or a row of losses."""
        if list_checkpoints(self.checkpoints) or any(self.path.glob("*.pth.tar")):
            return True
        return any(has_rows(path) for path in self.path.glob("*_r*.csv"))

    def check_unlocked(self) -> None:
        """Refuse a folder that another run writes into. Changes nothing.

        Raises:
            RunFolderError: another process holds the lock.
        """
        with contextlib.suppress(FileNotFoundError), (self.path / LOCK).open() as file:
            _lock(file, fcntl.LOCK_SH, self.path)

    def check(self, config: Config, global_batch: int) -> None:
        """Refuse a folder that holds another run, or that cannot be written to. Changes nothing.

        A run that never made a step may be started anew with other settings.

        Raises:
            RunFolderError: the message names the settings that differ, with both values.
        """
        if not self.config_file.is_file():
            outputs = (self.csv_file(0), self.latest_export, self.checkpoints)
            found = [path.name for path in outputs if path.exists()]
            if found:
                raise RunFolderError(
                    f"{self.path} holds {', '.join(found)} but no config.yaml: another program's run? "
                    f"choose another logging.folder"
                )
        elif self.has_trained():
            self._check_same_run(config, global_batch)
        self._check_writable()

    def _check_same_run(self, config: Config, global_batch: int) -> None:
        try:
            earlier = load_config(self.config_file)
        except ConfigError as error:
            raise RunFolderError(f"{self.path} holds a run of another version: {error}") from None
        changes = [f"  {key}: {old} there, {new} now" for key, old, new in changed_settings(earlier, config)]
        # A start that never made a step may have had another one, but those after it have the same.
        before = [start["global_batch"] for start in self.read_starts() if "global_batch" in start] or [global_batch]
        if before[-1] != global_batch:
            changes.append(
                "  global batch (data.batch_size x processes x runtime.accumulation): "
                f"{before[-1]} there, {global_batch} now"
            )
        if changes:
            longer = config.optimization.epochs > earlier.optimization.epochs and self.latest_export.exists()
            remedy = (
                f"To train longer than a schedule that has ended, start a new run from its weights: "
                f"meta.load_checkpoint=true meta.read_checkpoint={self.latest_export} logging.folder=NEW"
            )
            lines = "\n".join([*changes, *([remedy] if longer else [])])
            raise RunFolderError(
                f"{self.path} holds a run with other settings; choose another logging.folder, or restore:\n{lines}"
            )

    def _check_writable(self) -> None:
        for folder in (self.path, self.checkpoints):
            try:
                check_writable(folder)
            except OSError as error:
                raise RunFolderError(f"{self.path} (logging.folder) cannot be written to: {error}") from None

    def remove_leftovers(self) -> None:
        """Remove what a killed run left half written or half removed. Call it with the folder locked."""
        for path in self.path.glob(f"{WRITING}*"):
            path.unlink(missing_ok=True)
        remove_leftovers(self.checkpoints)
        remove_leftovers(self.not_finite)

    # ---- Settings and environment

    def read_config(self) -> Config:
        """The settings of the run.

        Raises:
            RunFolderError: there are none. ConfigError: they cannot be read.
        """
        if not self.config_file.is_file():
            what = "is a file" if self.path.is_file() else "does not exist"
            what = "holds no config.yaml" if self.path.is_dir() else what
            parents = [folder for folder in self.path.parents[:2] if (folder / self.config_file.name).is_file()]
            which = f"such as {parents[0]}" if parents else "the one that logging.folder names"
            raise RunFolderError(f"{self.path} {what}; give a run folder, {which}")
        return load_config(self.config_file)

    def read_starts(self) -> list[dict[str, Any]]:
        """What `record_start` has written, one dictionary per start. A file that cannot be read counts as empty."""
        if not self.environment_file.is_file():
            return []
        try:
            starts = json.loads(self.environment_file.read_text())["starts"]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read and is ignored: %s", self.environment_file, error)
            return []
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    def read_start_time(self) -> float | None:
        """The time of the first start in seconds since 1970, None if it is not known."""
        try:
            first = datetime.strptime(self.read_starts()[0]["time"], TIME_FORMAT)
        except (IndexError, KeyError, TypeError, ValueError):
            return None
        return first.timestamp() + 1  # it is noted without fractions of a second

    def record_start(
        self, config: Config, device: torch.device, *, world_size: int, global_batch: int, step: int
    ) -> None:
        """Add this start to `environment.json` and write its settings, which may differ from those of earlier starts.

        Args:
            config: of the run.
            device: of this process.
            world_size: number of processes.
            global_batch: images per step.
            step: number of steps that are done.
        """
        try:
            earlier = load_config(self.config_file) if self.config_file.is_file() else config
        except ConfigError:  # of another version; the run made no step
            earlier = config
        changes = {key: {"from": old, "to": new} for key, old, new in different_settings(earlier, config)}
        start = {"step": step, "processes": world_size, "global_batch": global_batch, "changed_settings": changes}
        write_json(self.environment_file, {"starts": [*self.read_starts(), start | describe_environment(device)]})
        write_atomically(self.config_file, config.to_yaml())

    # ---- Losses

    def open_csv(self, rank: int, *, first_step: int, steps_per_epoch: int) -> StepCsv:
        """The CSV of a rank, to write the rows from `first_step` on."""
        return StepCsv(self.csv_file(rank), first_step=first_step, steps_per_epoch=steps_per_epoch)

    def open_metrics(self, *, first_step: int) -> MetricsFile:
        """The metrics of the run, to write the rows from `first_step` on. Rank 0 writes them."""
        return MetricsFile(self.metrics_file, first_step=first_step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`. Empty if there is no such file, or it cannot be read."""
        try:
            return read_metrics(self.metrics_file)
        except OSError:
            return []

    def read_losses(self) -> LossCurve | None:
        """The losses of the run, which are the same on all ranks. None if the run has no CSV.

        Raises:
            CsvError: the file cannot be read, or a column is missing.
        """
        path = self.csv_file(0)
        return read_losses(path) if path.is_file() else None

    def read_rollbacks(self) -> list[dict[str, Any]]:
        """What `write_rollbacks` has written: `from_step`, `to_step` and `finding` of each. Empty if it was not called.

        Raises:
            RunFolderError: the file cannot be read.
        """
        path = self.path / "rollbacks.json"
        if not path.is_file():
            return []
        try:
            return list(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(
                f"{path} cannot be read: {error}. Restore it, or remove it to train at the full learning rate"
            ) from None

    def write_rollbacks(self, rollbacks: list[dict[str, Any]]) -> None:
        """Note how often a run that had collapsed was rolled back."""
        write_json(self.path / "rollbacks.json", rollbacks)

    def read_logger_ids(self) -> dict[str, str]:
        """What `write_logger_ids` has written. Empty if it was not called, or the file cannot be read."""
        try:
            return dict(json.loads(self._logger_ids.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def write_logger_ids(self, identifiers: dict[str, str]) -> None:
        """Note the names that loggers of other projects have for the run, by the name of the logger."""
        write_json(self._logger_ids, identifiers)

    @property
    def _logger_ids(self) -> Path:
        return self.path / "logger_ids.json"

    def write_not_finite(self, steps: list[dict[str, Any]]) -> None:
        """Describe steps whose loss or gradient was not finite, beside the checkpoint in `not_finite/`."""
        write_json(self.not_finite / "steps.json", steps)


def _lock(file: IO[str], operation: int, folder: Path, tries: int = 1) -> bool:
    """Lock a file until it is closed. False if its file system has no locks."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            used = f"{folder} is being written by another run ({_read_holder(folder)})"
            if not left:
                raise RunFolderError(f"{used}; choose another logging.folder") from None
            logger.warning("%s; waiting up to %d s for the lock of a lost node", used, left * _LOCK_SECONDS)
            time.sleep(_LOCK_SECONDS)
        except OSError:
            break
    return False


def _read_holder(folder: Path) -> str:
    """Who holds the lock of a folder."""
    with contextlib.suppress(OSError):
        return (folder / LOCK).read_text(errors="replace") or "which is starting"
    return "of an unknown process"


def _name_holder(file: IO[str]) -> None:
    """Write who holds the lock into the file that is locked."""
    job = os.environ.get("SLURM_JOB_ID")
    with contextlib.suppress(OSError):  # of a full disk: others check that
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}")
        file.flush()


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """A run folder and its settings.

    Raises:
        RunFolderError: it is not a run folder. ConfigError: its settings cannot be read.
    """
    config = RunFolder(path, tag="").read_config()
    return RunFolder(path, config.logging.write_tag), config
