"""What a run reports: losses, speed and waiting for data, without making the host wait for the device at each step."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

# Above this share of the time without data, over so many steps, the run says what can be done.
MAX_WAIT, WAIT_STEPS = 0.05, 100
COLUMNS = ("epoch", "itr", "loss", "mask-A", "mask-B", "time (ms)")


class Stopwatch:
    """Moments on the device's own clock, which are marked at once and compared when the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        """This moment: when the device comes to what is enqueued next."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        """Seconds between two moments that have passed."""
        return start.elapsed_time(end) / 1000 if self._on_cuda else end - start


@dataclass(frozen=True)
class StepRecord:
    """A finished step. `loss` and `norm` are scalars on the device; moments are of a `Stopwatch`."""

    step: int
    epoch: int
    step_in_epoch: int
    loss: Tensor
    norm: Tensor
    context_size: int  # C
    target_size: int  # T
    learning_rate: float
    weight_decay: float
    momentum: float
    begun: torch.cuda.Event | float  # when the device had the step's data
    ended: torch.cuda.Event | float


@dataclass(frozen=True)
class StepValues:
    """A finished step on the host. `loss` is the mean over all ranks, `norm` that of the whole gradient."""

    record: StepRecord
    loss: float
    norm: float
    seconds: float
    waited: float  # seconds of them without data

    @property
    def finite(self) -> bool:
        return abs(self.loss) < float("inf") and abs(self.norm) < float("inf")


class Metrics:
    """Collects steps on the device and writes them in blocks: bar, CSV of every rank, TensorBoard of rank 0.

    Args:
        folder, tag: the CSV is `{tag}_r{rank}.csv` in the folder, with the published columns; `tensorboard/` beside it.
        num_steps: steps of the whole training.
        first_step: step to go on from; rows of later steps, which a killed run had written, are removed.
        steps_per_epoch: to find the place of `first_step` in the CSV.
        global_batch: images per step.
    """

    def __init__(
        self, folder: Path, tag: str, rank: int, device: torch.device, *,
        num_steps: int, first_step: int, steps_per_epoch: int, global_batch: int,
    ) -> None:  # fmt: skip
        self.stopwatch = Stopwatch(device)
        self._device, self._num_steps, self._global_batch = device, num_steps, global_batch
        self._records: list[StepRecord] = []
        self._previous = self.stopwatch.mark()
        self._rate: float | None = None
        self._waits: list[tuple[float, float]] | None = []  # (seconds, seconds without data) of steps; None: said
        path = folder / f"{tag}_r{rank}.csv"
        rows = _rows_before(path, first_step, steps_per_epoch)
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerows([COLUMNS, *rows])
        self._file.flush()
        self._board = None
        self._bar: tqdm | None = None
        self._rank = rank
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=first_step)
            if sys.stderr.isatty():
                self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def record(self, record: StepRecord) -> None:
        """Note a step; reads nothing from the device."""
        self._records.append(record)
        if self._bar is not None:
            self._bar.update()

    def restart_clock(self) -> None:
        """Count what went before as no step's time (saving, starting)."""
        self._previous = self.stopwatch.mark()

    def flush(self) -> list[StepValues]:
        """Fetch and write the steps noted since the last call: one transfer, one collective of all ranks."""
        if not self._records:
            return []
        values = torch.stack([torch.stack((r.loss.float(), r.norm.float())) for r in self._records])
        dist.all_reduce(values)
        values = (values / dist.get_world_size()).tolist()
        steps = []
        for record, (loss, norm) in zip(self._records, values, strict=True):
            seconds = self.stopwatch.seconds(self._previous, record.ended)
            steps.append(StepValues(record, loss, norm, seconds, self.stopwatch.seconds(self._previous, record.begun)))
            self._previous = record.ended
        self._records = []
        self._write(steps)
        return steps

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, steps: Sequence[StepValues]) -> None:
        for value in steps:
            record = value.record
            row = (record.epoch + 1, record.step_in_epoch, f"{value.loss:.9g}")  # 9 digits tell any two float32 apart
            row += (f"{record.context_size:.5f}", f"{record.target_size:.5f}", round(1000 * value.seconds))
            self._csv.writerow(row)
        self._file.flush()
        self._warn_of_waiting(steps)
        if self._rank != 0:
            return
        total, waited = sum(v.seconds for v in steps), sum(v.waited for v in steps)
        rate = len(steps) * self._global_batch / total if total > 0 else 0.0
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        last = steps[-1]
        self._board_rows(steps, rate, waited / total if total > 0 else 0.0)
        text = {
            "loss": f"{sum(v.loss for v in steps) / len(steps):.4f}",
            "images/s": f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
            "data wait": f"{waited / total:.0%}" if total > 0 else "-",
        }
        if self._bar is not None:
            self._bar.set_description(f"epoch {last.record.epoch + 1}", refresh=False)
            self._bar.set_postfix(text)
            return
        remaining = (self._num_steps - last.record.step - 1) * self._global_batch
        text["ETA"] = tqdm.format_interval(remaining / self._rate) if self._rate else "-"
        line = "  ".join(f"{key} {value}" for key, value in text.items())
        place = f"epoch {last.record.epoch + 1}  step {last.record.step + 1}/{self._num_steps}"
        print(f"{place}  {line}", file=sys.stderr, flush=True)

    def _warn_of_waiting(self, steps: Sequence[StepValues]) -> None:
        """Once on each rank that waits for data; the first steps fill the loader's queues, and do not count.

        A single slow rank holds up all others, whose waiting for it is no waiting for data.
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

    def _board_rows(self, steps: Sequence[StepValues], rate: float, waited: float) -> None:
        for value in steps:
            record = value.record
            self._board.add_scalar("loss", value.loss, record.step)
            self._board.add_scalar("gradient norm", value.norm, record.step)
        record = steps[-1].record
        for name in ("learning_rate", "weight_decay", "momentum"):
            self._board.add_scalar(name.replace("_", " "), getattr(record, name), record.step)
        self._board.add_scalar("images per second", rate, record.step)
        self._board.add_scalar("data wait share", waited, record.step)


def _rows_before(path: Path, first_step: int, steps_per_epoch: int) -> list[list[str]]:
    """The rows of an earlier start that stay true when training goes on from `first_step`."""
    if first_step == 0 or not path.is_file():
        return []
    kept = []
    with path.open(newline="") as file:
        for row in csv.reader(file):
            # A killed process can leave half a row at the end.
            if len(row) != len(COLUMNS) or not (row[0].isdigit() and row[1].isdigit()):
                continue
            if (int(row[0]) - 1) * steps_per_epoch + int(row[1]) < first_step:
                kept.append(row)
    return kept
