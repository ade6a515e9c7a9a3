"""The training loop: from a configuration to a trained, resumable, exported model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmtjepa import checkpoint_format
from dmtjepa.config import Config, ConfigError
from dmtjepa.data import Loader, build_loader
from dmtjepa.interop import export_checkpoint, load_model
from dmtjepa.masks import MaskBatch, check_masks, sample_masks
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.run_folder import check_folder, locked, write_environment, write_settings
from dmtjepa.training.checkpoint_writer import CheckpointWriter, model_state, optimizer_steps, set_optimizer_steps
from dmtjepa.training.distributed import Agreement, DistributedError, World
from dmtjepa.training.metrics import Metrics, StepRecord, StepValues
from dmtjepa.training.parallelize import build_mesh, compute_dtype, is_compiled, parallelize, recomputation
from dmtjepa.training.schedules import build_schedules
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.step import Batch, TrainStep
from dmtjepa.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """More steps than allowed had a loss or gradient that is not finite; the message names steps, samples and files."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after `step` of `num_steps`; `signals` are those that any rank received."""

    step: int
    num_steps: int
    signals: tuple[int, ...]

    @property
    def complete(self) -> bool:
        return self.step == self.num_steps


def train(config: Config, world: World) -> Outcome:
    """Train, or go on training, in `config.logging.folder`.

    All processes of a joined group call this alike. A stop signal on any of them makes all finish the step, save and
    return.

    Raises:
        RunFolderError: the folder holds another run.
        DataError, MaskError: the settings do not allow a single step.
        NonFiniteLoss: see `optimization.max_skipped_steps`.
        CheckpointError: a checkpoint could not be written or read.
    """
    folder = Path(config.logging.folder)
    check_masks(config.mask, config.grid_size)
    with contextlib.ExitStack() as stack:
        global_batch = config.data.batch_size * world.world_size * config.runtime.accumulation

        def claim() -> None:
            stack.enter_context(locked(folder))
            check_folder(folder, config, global_batch)
            write_settings(folder, config)

        _on_rank_0(world, claim)
        watchdog = stack.enter_context(Watchdog(world, config.runtime.hang_timeout))
        signals = stack.enter_context(StopSignals())
        trainer = Trainer(config, world, folder, watchdog)
        stack.callback(trainer.close)
        step = trainer.run(signals)
        received: list[list[int]] = [[]] * world.world_size
        dist.all_gather_object(received, signals.received)
        return Outcome(step, trainer.schedules.num_steps, tuple(sorted({n for part in received for n in part})))


def _on_rank_0(world: World, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and return its result on all ranks; its exception is raised on all."""
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class Trainer:
    """A run on one rank: data, model, optimizer and the place in training (`step` steps are done)."""

    def __init__(self, config: Config, world: World, folder: Path, watchdog: Watchdog) -> None:
        self.config, self.world, self.folder, self.watchdog = config, world, folder, watchdog
        runtime = config.runtime
        self.accumulation = runtime.accumulation
        self.global_batch = config.data.batch_size * world.world_size * self.accumulation
        self.loader = build_loader(
            config.data, seed=runtime.seed, rank=world.rank, world_size=world.world_size, device=world.device
        )
        steps_per_epoch = self.loader.steps_per_epoch // self.accumulation
        if steps_per_epoch == 0:
            raise ConfigError(
                f"the global batch of {self.global_batch} images is larger than the data set of "
                f"{self.loader.num_images}; lower runtime.accumulation"
            )
        self.schedules = build_schedules(config.optimization, steps_per_epoch, self.global_batch)

        torch.manual_seed(runtime.seed)  # the same weights on every rank
        self.mesh = build_mesh(world.device.type, world.world_size, runtime.shard_size, world.timeout)
        try:
            model = build_model(config, world.device.type)
        except (ValueError, ModuleNotFoundError) as error:  # what this device or its software cannot do
            raise ConfigError(str(error)) from error
        begun = self._find_checkpoint()
        if begun is None:
            self._load_initial(model)
        self.model = parallelize(
            model,
            self.mesh,
            dtype=compute_dtype(config, world.device.type),
            compiled=is_compiled(config, world.device.type),
            recompute=recomputation(config, world.device.type),
            reshard_after_forward=runtime.reshard_after_forward,
        )
        self.update = TrainStep(self.model, config.optimization, self.schedules, self.mesh, world.device, self._at)
        self.optimizer = self.update.optimizer

        self.agreement = Agreement(self._gloo_group())
        self.writer = CheckpointWriter(folder / "checkpoints", self._gloo_group(), runtime.keep_last, world.device)
        self.step = 0
        self.num_skipped = 0
        self.epoch_loss = [0.0, 0]  # sum and number of the finite losses of the current epoch
        if begun is not None:
            self._resume(begun)
        if world.rank == 0:
            write_environment(folder, world.world_size, world.device, self.global_batch, self.step)
        self.metrics = Metrics(
            folder, config.logging.write_tag, world.rank, world.device, num_steps=self.schedules.num_steps,
            first_step=self.step, steps_per_epoch=steps_per_epoch, global_batch=self.global_batch,
        )  # fmt: skip

    def train_step(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """One update; loss and gradient norm, scalars on the device."""
        return self.update(batches, self.step)

    # ---- The loop

    def run(self, signals: StopSignals) -> int:
        """Train to the end, or to a signal on any rank; returns the number of steps done."""
        schedules, runtime = self.schedules, self.config.runtime
        mark = self.metrics.stopwatch.mark
        stream = BatchStream(self.loader, self._sample, mark, self.world.device, self.accumulation)
        stopping = False
        self.metrics.restart_clock()
        while self.step < schedules.num_steps and not stopping:
            epoch, first = divmod(self.step, schedules.steps_per_epoch)
            for step_in_epoch, batches, begun in stream.epoch(epoch, first, schedules.steps_per_epoch):
                loss, norm = self.train_step(batches)
                self._record(epoch, step_in_epoch, batches, loss, norm, begun)
                self.step += 1

                failed = self.writer.failed()
                agreed = self.agreement.exchange(
                    Agreement.FAIL if failed else Agreement.STOP if signals.received else Agreement.CONTINUE
                )
                if agreed == Agreement.FAIL:
                    self.writer.wait()
                    raise DistributedError("another rank could not write its part of a checkpoint; see its log")
                stopping = agreed == Agreement.STOP
                epoch_done = step_in_epoch + 1 == schedules.steps_per_epoch
                due = epoch_done and (epoch + 1) % runtime.save_every_epochs == 0
                due |= runtime.save_every_steps is not None and self.step % runtime.save_every_steps == 0
                due |= stopping or self.step == schedules.num_steps
                if not due:  # after saving, whose time is no step's
                    self._at("data")
                    stream.fetch()
                if due or epoch_done or self.step % runtime.log_every == 0:
                    self._at("logging")
                    self._check(self.metrics.flush())
                if due:
                    self._save(epoch_done)
                    self.metrics.restart_clock()
                if epoch_done:
                    self.epoch_loss = [0.0, 0]
                self._at("data")
                if stopping:
                    break
        self._at("saving")
        self.agreement.finish()
        self.writer.wait()
        return self.step

    def close(self) -> None:
        self.metrics.close()
        self.loader.close()

    def _sample(self, epoch: int, step_in_epoch: int, part: int) -> MaskBatch:
        """The masks of a part of a step: image b of part a on rank r is image (a*W + r)*B + b of the global batch."""
        config, world = self.config, self.world
        return sample_masks(
            config.mask,
            config.grid_size,
            config.data.batch_size,
            config.runtime.seed,
            epoch * self.schedules.steps_per_epoch + step_in_epoch,
            part * world.world_size + world.rank,
            self.accumulation * world.world_size,
            window=config.patch.patch_k_size,
            border=config.patch.border,
        )

    def _at(self, phase: str) -> None:
        self.watchdog.at(phase, self.step)

    def _record(
        self, epoch: int, step_in_epoch: int, batches: list[Batch], loss: Tensor, norm: Tensor, begun: Any
    ) -> None:
        masks = batches[0][1]
        self.metrics.record(
            StepRecord(
                step=self.step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                loss=loss,
                norm=norm,
                context_size=round(masks.context_size),
                target_size=masks.target_index.shape[2],
                learning_rate=self.schedules.learning_rate(self.step),
                weight_decay=self.schedules.decay(self.step),
                momentum=self.schedules.momentum(self.step),
                begun=begun,
                ended=self.metrics.stopwatch.mark(),
            )
        )

    def _check(self, steps: list[StepValues]) -> None:
        """Count losses, and stop where too many steps were skipped because they were not finite."""
        for value in steps:
            if value.finite:
                self.epoch_loss[0] += value.loss
                self.epoch_loss[1] += 1
        bad = [value for value in steps if not value.finite]
        if not bad:
            return
        self.num_skipped += len(bad)
        rows = [self._describe_step(value) for value in bad]
        allowed = self.config.optimization.max_skipped_steps
        text = "; ".join(
            f"step {row['step']} (epoch {row['epoch']}, samples {row['samples'][0]} to {row['samples'][1]} of its "
            f"order): loss {row['loss']}, gradient norm {row['gradient_norm']}"
            for row in rows
        )
        if self.num_skipped <= allowed:
            if self.world.rank == 0:
                logger.warning("skipped, %d of at most %d: %s", self.num_skipped, allowed, text)
            return
        self.writer.wait()
        folder = self.folder / "not_finite"
        writer = CheckpointWriter(folder, self._gloo_group(), keep_last=1, device=self.world.device)
        writer.save(self._state(), self._meta(keep=False))
        writer.close()
        if self.world.rank == 0:
            (folder / "steps.json").write_text(json.dumps(rows, indent=1))
        raise NonFiniteLoss(
            f"{text}. {self.num_skipped} steps were skipped in all and optimization.max_skipped_steps is {allowed}. "
            f"The student never took these steps; the state after them and a description are in {folder}. To go on "
            f"from the last checkpoint and skip such steps, raise optimization.max_skipped_steps and start again"
        )

    def _gloo_group(self) -> dist.ProcessGroup:
        """A group of all ranks for talk between their hosts."""
        return dist.new_group(backend="gloo", timeout=self.world.timeout)

    def _describe_step(self, value: StepValues) -> dict[str, Any]:
        record = value.record
        first = record.step_in_epoch * self.global_batch
        return {
            "step": record.step,
            "epoch": record.epoch,
            "seed": self.config.runtime.seed,
            "samples": [first, first + self.global_batch - 1],
            "loss": str(value.loss),
            "gradient_norm": str(value.norm),
            "learning_rate": record.learning_rate,
        }

    # ---- Checkpoints

    def _state(self) -> dict[str, Tensor]:
        state = model_state(self.model, self.optimizer)
        state[f"rng.{self.world.rank}"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            state[f"rng.cuda.{self.world.rank}"] = torch.cuda.get_rng_state(self.world.device)
        return state

    def _meta(self, keep: bool) -> dict[str, Any]:
        """The plain values of a checkpoint. `epoch` counts finished epochs."""
        epoch, step_in_epoch = divmod(self.step, self.schedules.steps_per_epoch)
        last = self.step - 1
        return {
            "step": self.step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "steps_per_epoch": self.schedules.steps_per_epoch,
            "num_images": self.loader.num_images,
            "loss": self.epoch_loss[0] / self.epoch_loss[1] if self.epoch_loss[1] else None,
            "epoch_loss": self.epoch_loss,
            "lr": self.schedules.learning_rate(last),
            "weight_decay": self.schedules.decay(last),
            "optimizer_steps": optimizer_steps(self.optimizer),
            "num_skipped": self.num_skipped,
            "batch_size": self.config.data.batch_size,
            "accumulation": self.accumulation,
            "world_size": self.world.world_size,
            "global_batch": self.global_batch,
            "parameters": [name for name, p in self.model.named_parameters() if p.requires_grad],
            "keep": keep,
            "config": self.config.model_dump(mode="json"),
        }

    def _save(self, epoch_done: bool) -> None:
        """Save in the background; at the end of an epoch also export `latest`, and the epochs that are kept."""
        self._at("saving")
        finished = self.step // self.schedules.steps_per_epoch
        last = self.step == self.schedules.num_steps
        keep = epoch_done and (finished % self.config.runtime.keep_every_epochs == 0 or last)
        exports = ["latest"] * epoch_done + [f"ep{finished}"] * keep
        paths = [self.folder / f"{self.config.logging.write_tag}-{name}.pth.tar" for name in exports]
        then = (lambda written: _export(written, paths)) if paths else None
        self.writer.save(self._state(), self._meta(keep), then)

    def _find_checkpoint(self) -> Path | None:
        """The newest whole checkpoint of the run folder, if there is one."""

        def find() -> Path | None:
            checkpoint_format.remove_leftovers(self.folder / "checkpoints")
            return checkpoint_format.newest_whole(self.folder / "checkpoints")

        return _on_rank_0(self.world, find)

    def _load_initial(self, model: DMTJEPA) -> None:
        """Start a new run from the weights that `meta.read_checkpoint` names; every rank reads the file."""
        meta = self.config.meta
        if not meta.load_checkpoint:
            return
        if meta.read_checkpoint is None:
            if self.world.rank == 0:
                logger.info("meta.load_checkpoint: %s holds no checkpoint yet; the run starts afresh", self.folder)
            return
        path = Path(os.path.expandvars(meta.read_checkpoint)).expanduser()
        if not path.exists():
            path = self.folder / meta.read_checkpoint
        absent = load_model(model, path)
        if self.world.rank == 0:
            kept = f"; it holds no {' and no '.join(absent)}: newly drawn" if absent else ""
            logger.info("started from the weights of %s%s", path, kept)

    def _resume(self, found: Path) -> None:
        """Go on from a checkpoint."""
        meta = checkpoint_format.read_meta(found)
        if meta["steps_per_epoch"] != self.schedules.steps_per_epoch:
            raise checkpoint_format.CheckpointError(
                f"{found} counts {meta['steps_per_epoch']} steps per epoch of {meta['num_images']} images, and this "
                f"run {self.schedules.steps_per_epoch} of {self.loader.num_images}: the data set has changed"
            )
        state = self._state()
        if meta["world_size"] != self.world.world_size:  # no generator of another number of ranks can be continued
            state = {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}
        checkpoint_format.load_into(state, found)
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        )
        set_optimizer_steps(self.optimizer, meta["optimizer_steps"])
        if f"rng.{self.world.rank}" in state:
            torch.set_rng_state(state[f"rng.{self.world.rank}"])
        if f"rng.cuda.{self.world.rank}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda.{self.world.rank}"], self.world.device)
        self.step, self.num_skipped, self.epoch_loss = meta["step"], meta["num_skipped"], meta["epoch_loss"]
        if self.world.rank == 0:
            logger.info(
                "resumed from %s: step %d, epoch %d, written by %d processes",
                found, meta["step"], meta["epoch"], meta["world_size"],
            )  # fmt: skip


def _export(checkpoint: Path, paths: list[Path]) -> None:
    """Export to the first path, and link or copy it to the others."""
    first, *others = paths
    export_checkpoint(checkpoint, first)
    for path in others:
        path.unlink(missing_ok=True)
        try:
            os.link(first, path)
        except OSError:
            shutil.copyfile(first, path)


class BatchStream:
    """The batches of a rank in order, on the device, one step ahead; a thread of the host samples the masks.

    On CUDA, copies go through a stream of their own: what is fetched while the device computes is there in time.

    Args:
        sample: (epoch, step in the epoch, part of the step) -> masks.
        mark: notes the moment on the device's clock, as `Stopwatch.mark`.
    """

    def __init__(
        self,
        loader: Loader,
        sample: Callable[[int, int, int], MaskBatch],
        mark: Callable[[], Any],
        device: torch.device,
        accumulation: int,
    ) -> None:
        self._loader, self._sample, self._mark = loader, sample, mark
        self._device, self._accumulation = device, accumulation
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def epoch(self, epoch: int, first_step: int, num_steps: int) -> Iterator[tuple[int, list[Batch], Any]]:
        """(step in the epoch, its batches, the moment when the device had them) from `first_step` on."""
        self._coming = self._bring_all(epoch, first_step, num_steps)
        self._ready = None
        while True:
            self.fetch()
            if self._ready is None:
                return
            ready, self._ready = self._ready, None
            yield ready

    def fetch(self) -> None:
        """Bring the batches of the next step, if they are not there: called once the device has the current step to do,
        and before the host waits for it."""
        if self._ready is None:
            self._ready = next(self._coming, None)

    def _bring_all(self, epoch: int, first_step: int, num_steps: int) -> Iterator[tuple[int, list[Batch], Any]]:
        images = self._loader.epoch(epoch, first_step * self._accumulation)
        parts = range(self._accumulation)
        masks = [self._thread.submit(self._sample, epoch, first_step, part) for part in parts]
        for step in range(first_step, num_steps):
            current = masks
            if step + 1 < num_steps:
                masks = [self._thread.submit(self._sample, epoch, step + 1, part) for part in parts]
            yield step, [self._bring(next(images), future.result()) for future in current], self._mark()

    def _bring(self, images: Tensor, masks: MaskBatch) -> Batch:
        if self._copies is None:
            return images, masks
        with torch.cuda.stream(self._copies):
            images = images.to(self._device, non_blocking=True)
            masks = masks.pin_memory().to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        images.record_stream(current)
        masks.record_stream(current)
        return images, masks
