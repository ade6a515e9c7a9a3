"""What a run consists of, built once at its start."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dmtjepa.config import Config
from dmtjepa.data import Loader, StoredSource, build_loader
from dmtjepa.data.fingerprint import Fingerprint
from dmtjepa.interop import load_model
from dmtjepa.interop.sources import find_initial_weights
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.objective import DMTJEPA
from dmtjepa.run_folder import RunFolder, RunFolderError
from dmtjepa.training.agreement import check_ranks_agree, check_weights_agree
from dmtjepa.training.banner import announce
from dmtjepa.training.batches import BatchStream
from dmtjepa.training.check import (
    build_model_for,
    check_checkpoint,
    count_steps_per_epoch,
)
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import World, new_gloo_group, run_on_rank_0
from dmtjepa.training.estimate import resolve_checkpointing
from dmtjepa.training.evaluation import PeriodicEvaluation
from dmtjepa.training.finite import FiniteCheck
from dmtjepa.training.graphs import GraphedStep, uses_graphs
from dmtjepa.training.images import record_images
from dmtjepa.training.instruments import Instruments
from dmtjepa.training.metrics import Metrics, StepValues
from dmtjepa.training.parallelize import build_mesh, parallelize
from dmtjepa.training.saving import Saver
from dmtjepa.training.schedules import Schedules, build_schedules
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.state import TrainingState
from dmtjepa.training.step import TrainStep
from dmtjepa.training.trackers import open_trackers
from dmtjepa.training.vote import RankVote
from dmtjepa.training.watch import CollapseWatch, slow_down
from dmtjepa.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank."""

    schedules: Schedules
    train_step: TrainStep | GraphedStep
    instruments: Instruments
    state: TrainingState
    vote: RankVote
    saver: Saver
    finite_check: FiniteCheck
    watch: CollapseWatch
    metrics: Metrics
    evaluation: PeriodicEvaluation
    batches: BatchStream

    def judge(self, steps: list[StepValues]) -> None:
        """Judge what `Metrics.flush` has returned. Raises NonFiniteLoss."""
        self.finite_check.check(steps)
        self.watch.look(steps)


def open_folder(config: Config, world: World, stack: contextlib.ExitStack) -> RunFolder:
    """Lock the run folder for as long as `stack` is open, and check again that no other run has used it meanwhile.

    Raises:
        RunFolderError: the folder holds another run, or another process uses it.
    """
    folder = RunFolder.from_config(config)

    def open_on_rank_0() -> None:
        stack.enter_context(folder.locked())
        folder.check(config, config.global_batch(world.world_size))

    run_on_rank_0(world, open_on_rank_0)
    return folder


def build_run(
    config: Config,
    world: World,
    folder: RunFolder,
    source: StoredSource,
    watchdog: Watchdog,
    signals: StopSignals,
    stack: contextlib.ExitStack,
) -> Run:
    """Build the parts of a run and restore its newest checkpoint, if there is one. Then write the settings.

    Args:
        folder: opened by `open_folder`.
        source: of the images, opened by `check_start`.
        stack: closes what must be closed.

    Raises:
        ConfigError, DataError, WeightsError: the settings do not allow a single step.
        CheckpointError: the checkpoint does not fit this run.
    """
    runtime, global_batch = config.runtime, config.global_batch(world.world_size)
    loader = build_loader(
        config.data, seed=runtime.seed, rank=world.rank, world_size=world.world_size, device=world.device, source=source
    )
    stack.callback(loader.close)
    check_ranks_agree(config, source, loader.name, world)
    steps_per_epoch = count_steps_per_epoch(config, world.world_size, loader.num_images)
    num_rollbacks = run_on_rank_0(world, lambda: len(folder.read_rollbacks()))
    schedules = slow_down(build_schedules(config.optimization, steps_per_epoch, global_batch), num_rollbacks)

    torch.manual_seed(runtime.seed)  # the same weights on every rank
    mesh = build_mesh(world.device.type, world.world_size, runtime.shard_size, world.timeout)
    model = build_model_for(config, world.device.type)
    resume_from, images = find_checkpoint(config, folder, source, loader.name, world)
    if resume_from is None:
        load_initial_weights(model, config, folder, world)
    resolved = resolve_checkpointing(config, world.world_size, world.device)
    model = parallelize(model, mesh, ComputePlan.from_config(resolved, world.device.type))
    instruments = Instruments(model, config, schedules.num_steps)
    train_step = TrainStep(
        model, config.optimization, schedules, mesh, world.device, watchdog.on_phase, instruments,
        fused=runtime.fused_update,
    )  # fmt: skip
    step = GraphedStep(train_step) if uses_graphs(config, world.world_size, world.device.type) else train_step
    state = TrainingState(config, world, model, train_step.optimizer, schedules, images)
    vote = RankVote(new_gloo_group(world))
    saver = Saver(config, world, folder, schedules, state, signals)
    stack.push(saver.wait_after_failure)
    if resume_from is not None:
        state.restore(resume_from)
        saver.export_missing()
    announce(config, world, source, loader.name, model, schedules, state.step)
    metrics = _start_records(config, world, folder, source, images, schedules, state.step)
    stack.callback(metrics.close)
    batches = _build_batches(config, world, loader, schedules, metrics, stack)
    watch = CollapseWatch(config, world, folder, saver, first_step=state.step)
    evaluation = PeriodicEvaluation(config, world, folder, schedules, state, metrics, watchdog, signals)
    finite_check = FiniteCheck(config, world, state, saver)
    return Run(schedules, step, instruments, state, vote, saver, finite_check, watch, metrics, evaluation, batches)


def _start_records(
    config: Config,
    world: World,
    folder: RunFolder,
    source: StoredSource,
    images: Fingerprint,
    schedules: Schedules,
    step: int,
) -> Metrics:
    """Write the settings of this start, and open the files of losses and figures."""
    global_batch = config.global_batch(world.world_size)
    with _named_failure(folder):
        if world.rank == 0:
            folder.record_start(config, world.device, world_size=world.world_size, global_batch=global_batch, step=step)
            record_images(folder, source, images)
        return Metrics(
            folder,
            world.rank,
            world.device,
            schedules=schedules,
            first_step=step,
            global_batch=global_batch,
            trackers=open_trackers(config, folder) if world.rank == 0 else (),
        )


@contextlib.contextmanager
def _named_failure(folder: RunFolder) -> Iterator[None]:
    """Files that cannot be written at a start end it: checkpoints could not be written either."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{folder.path} (logging.folder) cannot be written to: {error}. Is the disk full? Nothing that was there "
            "is lost; start again when it can be written"
        ) from error


def _build_batches(
    config: Config,
    world: World,
    loader: Loader,
    schedules: Schedules,
    metrics: Metrics,
    stack: contextlib.ExitStack,
) -> BatchStream:
    accumulation = config.runtime.accumulation
    sampler = MaskSampler.from_config(config)

    def sample(step: int, micro_batch: int) -> MaskBatch:
        """Image b of micro-batch a on rank r of W is image (a*W + r)*B + b of the global batch."""
        shard = micro_batch * world.world_size + world.rank
        return sampler.sample(step, shard, accumulation * world.world_size)

    batches = BatchStream(
        loader,
        sample,
        metrics.stopwatch.record_event,
        world.device,
        steps_per_epoch=schedules.steps_per_epoch,
        accumulation=accumulation,
    )
    stack.callback(batches.close)
    return batches


def find_checkpoint(
    config: Config, folder: RunFolder, source: StoredSource, loader: str, world: World
) -> tuple[Path | None, Fingerprint]:
    """The checkpoint to resume from, and what the run trains on. Removes what a killed run left half written.

    Raises:
        CheckpointError: see `check_checkpoint`.
    """

    def find() -> tuple[Path | None, Fingerprint]:
        folder.remove_leftovers()
        return check_checkpoint(config, folder, source, loader, world.world_size)

    return run_on_rank_0(world, find)


def load_initial_weights(model: DMTJEPA, config: Config, folder: RunFolder, world: World) -> None:
    """Load the weights that `meta.read_checkpoint` names into the model of a new run. Every rank reads the file."""
    path = find_initial_weights(config, folder)
    if path is None:
        return
    check_weights_agree(path, world)
    absent = load_model(model, path)
    if world.rank == 0:
        kept = f"; it holds no {' and no '.join(absent)}: newly drawn" if absent else ""
        logger.info("started from the weights of %s%s", path, kept)
