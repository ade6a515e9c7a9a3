"""Evaluation during training: when, of which weights, and what becomes of the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmtjepa.config import Config
from dmtjepa.evaluation.errors import EvaluationError, EvaluationStopped
from dmtjepa.evaluation.evaluator import START_MEASURED, START_NOT_MEASURED, Evaluator, open_asked_splits
from dmtjepa.evaluation.gains import DIGEST, same_images
from dmtjepa.evaluation.ranks import SURVIVED, Failure, Ranks
from dmtjepa.evaluation.verdict import find_over_training
from dmtjepa.interop import WeightsError, read_checkpoint, write_official
from dmtjepa.metrics_file import read_metrics
from dmtjepa.models import VisionTransformer
from dmtjepa.objective import build_frozen_encoder
from dmtjepa.run_folder import RunFolder
from dmtjepa.tensors import whole_tensors
from dmtjepa.training.agreement import check_evaluation_agrees, first_fault
from dmtjepa.training.distributed import DistributedError, World, new_gloo_group, run_on_rank_0
from dmtjepa.training.metrics import Metrics
from dmtjepa.training.phase import Phase
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.state import TrainingState
from dmtjepa.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

PREFIX, PICTURE_PREFIX = "eval/", "figures/"
SCORES = ("eval/linear", "eval/miou")
"""What decides which evaluation is the best: the first of them that is measured."""
SUMMARY = {"knn_20": "k-NN", "linear": "linear", "miou": "mIoU"}


class PeriodicEvaluation:
    """Measures student and teacher every `evaluation.every_epochs` epochs, and after the last.

    A run that starts from weights (`meta.read_checkpoint`) is measured before its first step, too: that row of figures
    has step -1. Unless `evaluation.measure_start` is false, it is measured then and after its last step in any case, if
    its images allow it. Training waits meanwhile. Its random numbers are not touched: the losses are those of a run
    without evaluation.

    A stop signal ends an evaluation, because a cluster does not wait for it. The run then stops at this step, and the
    next start evaluates there. What cannot be measured is left out with a warning, see `Ranks`.

    Args:
        config, world, folder, schedules, state, metrics, watchdog, signals: of the run.
    """

    abandoned: bool = False
    """Whether the last evaluation was ended by a stop signal: the same on all ranks."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        schedules: Schedules,
        state: TrainingState,
        metrics: Metrics,
        watchdog: Watchdog,
        signals: StopSignals,
    ) -> None:
        self._config, self._world, self._folder = config, world, folder
        self._schedules, self._state, self._metrics, self._watchdog = schedules, state, metrics, watchdog
        self._every_epochs = config.evaluation.every_epochs
        self._evaluator: Evaluator | None = None
        self._has_drawn = False
        self._ranks = Ranks()
        faults: list[str] = []
        splits = open_asked_splits(config, faults.append)
        fault = first_fault(faults[0] if faults else None, world)
        if fault is not None:
            self._log_fault(fault)
        elif splits is not None:
            group = new_gloo_group(world) if world.world_size > 1 else None
            self._ranks = Ranks(world.rank, world.world_size, group, lambda: bool(signals.received))
            self._evaluator = Evaluator(
                config,
                splits,
                self._ranks,
                device=world.device,
                num_workers=config.data.num_workers,
                on_progress=lambda: watchdog.on_phase(Phase.EVALUATION),
            )
            try:
                check_evaluation_agrees(self._evaluator, world)
            except DistributedError as error:
                if self._every_epochs:
                    raise
                self._evaluator = None
                self._log_fault(str(error))
            if world.rank == 0 and self._evaluator is not None and not self._every_epochs and state.step == 0:
                logger.info(START_MEASURED, len(splits.train), len(splits.validation))

    def _log_fault(self, reason: str) -> None:
        if self._world.rank == 0:
            logger.info(START_NOT_MEASURED, reason)

    def is_due(self) -> bool:
        """Whether the settings ask for an evaluation after the steps that are done."""
        step, every_epochs = self._state.step, self._every_epochs
        if self._evaluator is None:
            return False
        if step == 0:
            return self._config.measures_start
        at_epoch = every_epochs > 0 and step % (self._schedules.steps_per_epoch * every_epochs) == 0
        return at_epoch or step == self._schedules.num_steps

    def run_missing(self) -> None:
        """Evaluate now, if that is due at the step that a start begins at and was not done by an earlier start."""
        if not self.is_due():
            return
        last = self._state.step - 1
        done = run_on_rank_0(self._world, lambda: any(row["step"] == last for row in self._read_rows()))
        if not done:
            self.run()

    def run(self) -> None:
        """Measure the current weights, unless a stop signal ends that. All ranks call this alike."""
        assert self._evaluator is not None
        self._watchdog.on_phase(Phase.EVALUATION, self._state.step)
        start = time.perf_counter()
        model = self._state.model
        device = self._world.device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what training has cached and probes cannot use
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            weights = {
                name: whole_tensors(encoder.state_dict())
                for name, encoder in (("teacher", model.teacher_encoder), ("student", model.encoder))
            }
            try:
                encoders = self._ranks.together(
                    lambda: {name: build_frozen_encoder(self._config, w, device.type) for name, w in weights.items()}
                )
                numbers = self._evaluator.measure(encoders)
            except EvaluationError as error:  # raised alike on all ranks, as EvaluationStopped is
                if self._world.rank == 0:
                    logger.warning("not evaluated %s: %s", self._describe_moment(), error)
                return
            except EvaluationStopped:
                self.abandoned = True
                if self._world.rank == 0:
                    moment = self._describe_moment()
                    logger.info("the evaluation %s is ended by a stop signal; the next start makes up for it", moment)
                return
            pictures = self._draw(encoders["teacher"]) if self._world.rank == 0 else {}
        if self._world.rank == 0:
            values = {PREFIX + name: value for name, value in numbers.items()} | {DIGEST: self._evaluator.digest}
            if self._config.evaluation.keep_best:
                self._keep_if_best(values, weights)
            values["eval/seconds"] = time.perf_counter() - start
            self._metrics.write_values(self._state.step - 1, values)
            self._metrics.write_pictures(self._state.step - 1, pictures)
            logger.info("%s", self._describe(values))
            over_training = find_over_training(self._folder.read_metrics())
            if over_training is not None:
                logger.warning("%s", over_training)

    def _draw(self, teacher: VisionTransformer) -> dict[str, bytes]:
        """Pictures of what the teacher sees, by name. Empty if they cannot be drawn, which a run survives."""
        assert self._evaluator is not None
        self._watchdog.on_phase(Phase.EVALUATION)
        try:
            pictures = self._evaluator.draw(teacher, masks=not self._has_drawn)
        except Exception as error:  # whatever images, fonts or memory make of it
            logger.warning("no pictures %s: %s: %s", self._describe_moment(), type(error).__name__, error)
            return {}
        self._has_drawn = True
        return {PICTURE_PREFIX + name: picture for name, picture in pictures.items()}

    def _describe_moment(self) -> str:
        return f"after step {self._state.step}" if self._state.step else "before the first step"

    def _keep_if_best(self, values: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write `{tag}-best.pth.tar`, before the row of metrics: if a kill comes between, both are made again."""
        path, kept = self._folder.best_export, self._read_kept_evaluation()
        if not same_images(kept, values):
            kept = {}
        name = next((name for name in SCORES if name in values or kept.get(name) is not None), None)
        if name is None or name not in values:  # not measured, or not this time
            return
        if kept.get(name) is not None and values[name] <= kept[name]:
            return
        parts = {"encoder": weights["student"], "target_encoder": weights["teacher"]}
        try:
            on_host = {part: {key: value.cpu() for key, value in tensors.items()} for part, tensors in parts.items()}
            write_official(path, on_host, self._state.meta(keep=True) | {"evaluation": dict(values)})
        except SURVIVED as error:
            reason = Failure.from_error(error).reason
            logger.warning("%s cannot be written, and the best encoder is not kept: %s", path, reason)

    def _read_kept_evaluation(self) -> Mapping[str, Any]:
        """The evaluation of the weights in `{tag}-best.pth.tar`. Empty if there is none: then any other is better.

        It need not be the best of `metrics.jsonl`: the file may have been asked for later, or removed, or the disk was
        full; and a run that goes back to an earlier checkpoint removes rows.
        """
        path = self._folder.best_export
        try:
            kept = read_checkpoint(path) if path.is_file() else {}
        except WeightsError as error:
            logger.warning("%s is damaged and replaced: %s", path, error)
            return {}
        rows = [row for row in self._read_rows() if row["step"] == kept.get("step", 0) - 1]
        return kept.get("evaluation") or next(iter(rows), {})  # earlier versions wrote the step alone

    def _read_rows(self) -> list[dict[str, Any]]:
        """The earlier evaluations of this run."""
        path = self._folder.metrics_file
        rows = read_metrics(path) if path.is_file() else []
        return [row for row in rows if "eval/seconds" in row]

    def _describe(self, values: Mapping[str, Any]) -> str:
        parts = []
        for name, title in SUMMARY.items():
            found = {part: values.get(f"{PREFIX}{part}{name}") for part in ("", "student/")}
            teacher, student = ("not measured" if value is None else f"{100 * value:.1f}" for value in found.values())
            if any(value is not None for value in found.values()):
                parts.append(f"{title} {teacher} (student {student})")
        epoch, seconds = self._state.step / self._schedules.steps_per_epoch, values["eval/seconds"]
        when = f"after epoch {epoch:g}" if epoch else "before the first step"
        return f"evaluation {when} ({seconds:.1f} s): {', '.join(parts) or 'nothing could be measured'}"
