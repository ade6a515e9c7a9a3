"""The training loop: the story of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch.distributed as dist

from dmtjepa.config import Config
from dmtjepa.training.check import check_start
from dmtjepa.training.distributed import World
from dmtjepa.training.phase import Phase
from dmtjepa.training.setup import Run, build_run, open_folder
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.vote import Vote
from dmtjepa.training.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after `step` of `num_steps`. `signals` are those that any rank received.

    With `rolled_back`, it collapsed and has to be started again, from an earlier checkpoint. Unless `evaluated`, a
    signal ended the evaluation that is due after this step, and the next start makes up for it.
    """

    step: int
    num_steps: int
    signals: tuple[int, ...]
    rolled_back: bool = False
    evaluated: bool = True

    @property
    def complete(self) -> bool:
        return self.step == self.num_steps and self.evaluated


def train(config: Config, world: World) -> Outcome:
    """Train, or continue to train, in `config.logging.folder`.

    All ranks of the process group call this alike. A stop signal on any of them makes all finish the step, or end the
    evaluation, save and return.

    Raises:
        RunFolderError: the folder holds another run.
        ConfigError, DataError, MaskError, WeightsError: the settings do not allow a single step.
        NonFiniteLoss, CollapsedRun: see `optimization.max_skipped_steps` and `runtime.on_collapse`.
        CheckpointError: a checkpoint could not be written or read.
    """
    source = check_start(config, world.world_size, world.device.type)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(world, config.runtime.hang_timeout))
        folder = open_folder(config, world, stack)
        signals = stack.enter_context(StopSignals())
        run = build_run(config, world, folder, source, watchdog, signals, stack)
        state, metrics, num_steps = run.state, run.metrics, run.schedules.num_steps

        run.evaluation.run_missing()
        metrics.restart_clock()
        for batch in run.batches.steps(state.step, state.step if run.evaluation.abandoned else num_steps):
            if batch.step_in_epoch == 0:
                state.epoch_loss = (0.0, 0)
            loss, norm = run.train_step(batch.micro_batches, batch.step)
            metrics.record(batch, loss, norm, run.instruments.take())
            state.step += 1

            decision = run.vote.cast(
                Vote.FAIL if run.saver.failed() else Vote.STOP if signals.received else run.watch.vote
            )
            if decision == Vote.FAIL:
                run.saver.raise_failure()
            if decision == Vote.COLLAPSED and run.watch.rolls_back():
                return Outcome(state.step, num_steps, _gather_signals(signals, world), rolled_back=True)
            stopping = decision in (Vote.STOP, Vote.COLLAPSED)
            saving = stopping or run.saver.is_due()
            epoch_done = state.step % run.schedules.steps_per_epoch == 0
            evaluating = not stopping and run.evaluation.is_due()
            if not (saving or evaluating):  # else fetch afterwards: that time must not count as a step's
                watchdog.on_phase(Phase.DATA, state.step)
                run.batches.fetch()
            if saving or evaluating or epoch_done or state.step % config.runtime.log_every == 0:
                watchdog.on_phase(Phase.LOGGING, state.step)
                run.judge(metrics.flush())
            if saving:
                watchdog.on_phase(Phase.SAVING, state.step)
                run.saver.save()
            if evaluating:
                stopping = _evaluate(run, saved=saving)
            if saving or evaluating:
                metrics.restart_clock()
            if stopping:
                break
            watchdog.on_phase(Phase.DATA, state.step)

        watchdog.on_phase(Phase.SAVING, state.step)
        return _finish(run, signals, world)


def _evaluate(run: Run, *, saved: bool) -> bool:
    """Evaluate. Returns whether a stop signal has ended that: the next start then begins here, and makes up for it."""
    run.evaluation.run()
    if run.evaluation.abandoned and not saved:
        run.saver.save()
    return run.evaluation.abandoned


def _finish(run: Run, signals: StopSignals, world: World) -> Outcome:
    """Wait until everything is written and exported. Raises CollapsedRun if that is why the run ends."""
    run.vote.finish()
    run.saver.export_missing()
    run.saver.wait()
    run.watch.finish()
    step, num_steps, evaluated = run.state.step, run.schedules.num_steps, not run.evaluation.abandoned
    return Outcome(step, num_steps, _gather_signals(signals, world), evaluated=evaluated)


def _gather_signals(signals: StopSignals, world: World) -> tuple[int, ...]:
    """The signals that any rank received, without repetition."""
    received: list[list[int]] = [[]] * world.world_size
    dist.all_gather_object(received, signals.received)
    return tuple(sorted({number for numbers in received for number in numbers}))
