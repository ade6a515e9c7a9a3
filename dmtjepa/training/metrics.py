"""What a run reports: losses, speed and waiting for data. The host does not wait for the device at each step."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dmtjepa.metrics_file import MetricsFile
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.batches import StepBatch
from dmtjepa.training.event_file import EventFile
from dmtjepa.training.instruments import Reading, read_features, read_sums
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.stopwatch import Event, Stopwatch
from dmtjepa.training.trackers import TrackerThread

logger = logging.getLogger(__name__)

# A run that waits for data for a larger share of its time, over so many steps, warns and says what can be done.
MAX_WAIT, WAIT_STEPS = 0.05, 100


# Without steps per second, which images per second tell: a line of 80 columns is short.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class StepRecord:
    """A step that was enqueued on the device."""

    step: int
    epoch: int
    step_in_epoch: int
    loss: Tensor  # scalar on the device
    norm: Tensor  # scalar on the device
    context_size: int  # C
    target_size: int  # T
    learning_rate: float
    weight_decay: float
    momentum: float
    data_ready: Event  # when the device had the data of the step
    ended: Event
    reading: Reading | None  # of the instruments, on the device


@dataclass(frozen=True)
class StepValues:
    """A finished step, with numbers on the host."""

    record: StepRecord
    loss: float  # mean over all ranks
    norm: float  # of the whole gradient
    seconds: float
    waited: float  # seconds without data, part of `seconds`
    figures: dict[str, float] = field(default_factory=dict)  # of the instruments, by name; features on rank 0 alone

    @property
    def finite(self) -> bool:
        return abs(self.loss) < float("inf") and abs(self.norm) < float("inf")


class Metrics:
    """Collects steps on the device and writes them in blocks: a CSV file for every rank, and on rank 0 `metrics.jsonl`,
    TensorBoard, other loggers and a progress bar (without a terminal: lines).

    Args:
        folder: of the run.
        rank, device: of this process.
        schedules: of the run.
        first_step: the step to continue from. Rows of later steps, which a killed run had written, are removed.
        global_batch: images per step.
        trackers: loggers of other projects, on rank 0.
    """

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        device: torch.device,
        *,
        schedules: Schedules,
        first_step: int,
        global_batch: int,
        trackers: Sequence[TrackerThread] = (),
    ) -> None:
        self.stopwatch = Stopwatch(device)
        self._rank, self._schedules, self._global_batch = rank, schedules, global_batch
        self._records: list[StepRecord] = []
        self._previous = self.stopwatch.record_event()
        self._rate: float | None = None  # images per second, a moving average
        self._waits: list[tuple[float, float]] | None = []  # (seconds, seconds without data) of steps; None: has warned
        self._csv = folder.open_csv(rank, first_step=first_step, steps_per_epoch=schedules.steps_per_epoch)
        self._file: MetricsFile | None = None
        self._board: EventFile | None = None
        self._trackers = trackers
        self._shown: dict[str, float] = {}  # the latest figures of the progress line
        self._bar: tqdm | None = None
        if rank == 0:
            self._file = folder.open_metrics(first_step=first_step)
            self._board = EventFile(folder.tensorboard, purge_step=first_step)
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=schedules.num_steps, initial=first_step, dynamic_ncols=True, smoothing=0.1,
                    bar_format=BAR_FORMAT,
                )  # fmt: skip

    def record(self, batch: StepBatch, loss: Tensor, norm: Tensor, reading: Reading | None = None) -> None:
        """Note a step that was enqueued. Reads nothing from the device.

        Args:
            batch: what the step trained on.
            loss, norm: scalars on the device.
            reading: of the instruments, if the step was measured.
        """
        masks = batch.micro_batches[0][1]
        self._records.append(
            StepRecord(
                step=batch.step,
                epoch=batch.epoch,
                step_in_epoch=batch.step_in_epoch,
                loss=loss,
                norm=norm,
                context_size=round(masks.context_size),
                target_size=masks.target_index.shape[2],
                learning_rate=self._schedules.learning_rate(batch.step),
                weight_decay=self._schedules.decay(batch.step),
                momentum=self._schedules.momentum(batch.step),
                data_ready=batch.data_ready,
                ended=self.stopwatch.record_event(),
                reading=reading,
            )
        )
        if self._bar is not None:
            self._bar.update()

    def restart_clock(self) -> None:
        """Do not count the time until now (saving, starting) as part of a step."""
        self._previous = self.stopwatch.record_event()

    def flush(self) -> list[StepValues]:
        """Fetch and write the steps recorded since the last call, with one collective of all ranks.

        One transfer fetches everything but the features of a look, which rank 0 alone fetches.
        """
        if not self._records:
            return []
        losses = torch.stack([torch.stack((r.loss.float(), r.norm.float())) for r in self._records]).flatten()
        values = torch.cat([losses, *(r.reading.sums for r in self._records if r.reading is not None)])
        dist.all_reduce(values)
        values[: len(losses)] /= dist.get_world_size()
        numbers = iter(values.tolist())
        means = [(next(numbers), next(numbers)) for _ in self._records]
        steps = []
        for record, (loss, norm) in zip(self._records, means, strict=True):
            seconds = self.stopwatch.seconds(self._previous, record.ended)
            waited = self.stopwatch.seconds(self._previous, record.data_ready)
            figures: dict[str, float] = {}
            if record.reading is not None:
                sums = list(itertools.islice(numbers, len(record.reading.sums)))
                figures = read_sums(sums, record.reading.has_context)
                if self._rank == 0:
                    figures |= read_features(record.reading.features)
            steps.append(StepValues(record, loss, norm, seconds, waited, figures))
            self._previous = record.ended
        self._records = []
        self._write(steps)
        return steps

    def write_values(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write values, by name, into `metrics.jsonl`, TensorBoard and other loggers. Does nothing on ranks but 0.

        Args:
            step: number of the last finished step, from 0.
            values: `train/loss` and the like; what precedes the slash is a group in TensorBoard, which gets no text.
        """
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self._write_values(step, values, on_board=numbers)

    def write_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write pictures, JPEG files by name, into TensorBoard and other loggers. Does nothing on ranks but 0."""
        if self._board is not None:
            for name, picture in pictures.items():
                self._board.add_picture(name, picture, step)
            self._board.flush()
        for tracker in self._trackers:
            tracker.log_pictures(step, pictures)

    def _write_values(self, step: int, values: Mapping[str, float | str], on_board: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(step, values)
            self._file.flush()
        if self._board is not None:
            for name, value in on_board.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        self._csv.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, steps: Sequence[StepValues]) -> None:
        for value in steps:
            record = value.record
            sizes = (record.context_size, record.target_size)
            self._csv.write(record.epoch, record.step_in_epoch, value.loss, *sizes, value.seconds)
        self._csv.flush()
        self._warn_of_waiting(steps)
        if self._board is None:
            return
        total, waited = sum(v.seconds for v in steps), sum(v.waited for v in steps)
        rate = len(steps) * self._global_batch / total if total > 0 else 0.0
        wait_share = waited / total if total > 0 else 0.0
        figures = self._figures(steps, rate, wait_share)
        for value in steps:  # TensorBoard shows each step, under the names of the means
            self._board.add_scalar("train/loss", value.loss, value.record.step)
            self._board.add_scalar("train/grad_norm", value.norm, value.record.step)
        others = {name: value for name, value in figures.items() if name not in ("train/loss", "train/grad_norm")}
        self._write_values(steps[-1].record.step, figures, on_board=others)
        self._shown |= figures
        self._print_progress(steps, rate, f"{wait_share:.0%}" if total > 0 else "-")

    def _print_progress(self, steps: Sequence[StepValues], rate: float, wait_share: str) -> None:
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        last = steps[-1].record
        text = {
            "loss": f"{sum(v.loss for v in steps) / len(steps):.4f}",
            "images/s": f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
            "data wait": wait_share,
        }
        explained = self._shown.get("targets/explained_variance", math.nan)
        if math.isfinite(explained):
            text["explained"] = f"{explained:.0%}" if explained >= 0 else "<0%"
        if "features/effective_rank" in self._shown:
            text["rank"] = f"{self._shown['features/effective_rank']:.1f}"
        if self._bar is not None:
            self._bar.set_description(f"epoch {last.epoch + 1}", refresh=False)
            show_figures(self._bar, text)
            return
        num_steps = self._schedules.num_steps
        remaining = (num_steps - last.step - 1) * self._global_batch
        text["ETA"] = tqdm.format_interval(remaining / self._rate) if self._rate else "-"
        line = "  ".join(f"{key} {value}" for key, value in text.items())
        print(f"epoch {last.epoch + 1}  step {last.step + 1}/{num_steps}  {line}", file=sys.stderr, flush=True)

    def _warn_of_waiting(self, steps: Sequence[StepValues]) -> None:
        """Warn once, on each rank that waits for data. The first steps fill the queues of the loader and do not count.

        The others wait for a single slow rank, but they do not wait for data.
        """
        if self._waits is None:
            return
        self._waits += [(value.seconds, value.waited) for value in steps]
        if len(self._waits) < 2 * WAIT_STEPS:
            return
        total, waited = map(sum, zip(*self._waits[WAIT_STEPS:], strict=True))
        if waited <= MAX_WAIT * total:
            self._waits = self._waits[:WAIT_STEPS]
            return
        logger.warning(
            "rank %d: %.0f%% of the time goes by waiting for data. Raise data.num_workers towards the cores of this "
            "process, install DALI (data.loader: dali), or read from a faster disk or tar shards: docs/data.md, Speed",
            self._rank,
            100 * waited / total,
        )
        self._waits = None

    def _figures(self, steps: Sequence[StepValues], rate: float, wait_share: float) -> dict[str, float]:
        """The line of `metrics.jsonl`: means over steps, and what the last of them shows."""
        last, finite = steps[-1], [value for value in steps if value.finite]
        return {
            "epoch": (last.record.step + 1) / self._schedules.steps_per_epoch,
            "train/loss": sum(v.loss for v in finite) / len(finite) if finite else math.nan,
            "train/grad_norm": sum(v.norm for v in finite) / len(finite) if finite else math.nan,
            "train/lr": last.record.learning_rate,
            "train/weight_decay": last.record.weight_decay,
            "train/momentum": last.record.momentum,
            "train/images_per_second": rate,
            "train/data_wait": wait_share,
        } | last.figures


def show_figures(bar: tqdm, figures: Mapping[str, str]) -> None:
    """Show figures behind a progress bar: as many of the first ones as leave it ten characters in the terminal."""
    names = list(figures)
    while True:
        bar.set_postfix({name: figures[name] for name in names}, refresh=False)
        state = bar.format_dict
        columns = state["ncols"]
        if not names or columns is None or len(bar.format_meter(**state | {"ncols": None})) < columns:
            break
        names.pop()
    bar.refresh()
