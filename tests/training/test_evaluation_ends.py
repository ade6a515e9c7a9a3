"""Evaluations that a stop signal ends, or that fail, on one of two ranks: both ranks go on alike."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtjepa import checkpoint_format
from dmtjepa.config import Config
from dmtjepa.evaluation import evaluator
from dmtjepa.interop import read_checkpoint
from dmtjepa.metrics_file import read_metrics
from dmtjepa.processes import STOP_SIGNALS
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.distributed import World, process_group
from dmtjepa.training.evaluation import PeriodicEvaluation
from dmtjepa.training.loop import train
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

LAST = 16  # the step after which the two epochs of these runs end


class Faults:
    """Makes the evaluations of this process fail, and counts the batches that each encodes and the probes it fits."""

    def __init__(self) -> None:
        self.on_encode: dict[int, Callable[[], None]] = {}
        """What happens when the evaluation after a step encodes its first batch."""
        self.on_fit: dict[int, Exception] = {}
        """What every probe of the evaluation after a step raises."""
        self.num_encoded = self.num_fitted = self._step = 0
        evaluate, encode = PeriodicEvaluation.run, evaluator.Evaluator._encode
        fit, segment = evaluator.fit_linear, evaluator.segment

        def evaluate_counted(evaluation):
            self.num_encoded, self.num_fitted, self._step = 0, 0, evaluation._state.step
            evaluate(evaluation)

        def encode_or_fail(*arguments):
            self.num_encoded += 1
            self.on_encode.pop(self._step, lambda: None)()
            return encode(*arguments)

        def fit_or_fail(function, *arguments, **options):
            self.num_fitted += 1
            if self._step in self.on_fit:
                raise self.on_fit[self._step]
            return function(*arguments, **options)

        PeriodicEvaluation.run, evaluator.Evaluator._encode = evaluate_counted, encode_or_fail
        evaluator.fit_linear = lambda *arguments, **options: fit_or_fail(fit, *arguments, **options)
        evaluator.segment = lambda *arguments, **options: fit_or_fail(segment, *arguments, **options)


def on_ranks(tell: Callable[[World, Faults, list[Config]], object], configs: list[Config], out: Path) -> None:
    """Write what each rank tells."""
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the fork server holds them back
    logging.basicConfig(level=logging.INFO, force=True, format="%(levelname)s %(message)s")
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        (out / f"{world.rank}.json").write_text(json.dumps(tell(world, Faults(), configs)))


def run_two(tell, configs, folder):
    """What both ranks have told, and what rank 0 has logged."""
    (code, log), (other, other_log) = run_ranks(on_ranks, 2, folder, tell, configs, folder)
    assert (code, other) == (0, 0), log + other_log
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], log


@pytest.fixture
def two_epochs(settings, labelled):
    def build(name):
        changes = {"data.batch_size": 8, "optimization.epochs": 2, "runtime.save_every_epochs": 2}
        evaluation = {"every_epochs": 1, "data": str(labelled), "keep_best": True, "batch_size": 4}
        return settings(name, **changes | {f"evaluation.{name}": value for name, value in evaluation.items()})

    return build


def read_rows(config):
    rows = read_metrics(RunFolder.from_config(config).metrics_file)
    return [{name: row[name] for name in row if name != "eval/seconds"} for row in rows if "eval/seconds" in row]


def train_with_signals(world: World, faults: Faults, configs: list[Config]):
    """Train without signals; then in three starts, of which signals on one rank end the first two."""
    undisturbed, config = configs
    folder = RunFolder.from_config(config)
    assert train(undisturbed, world).complete
    told = []
    for step, rank, number in ((LAST // 2, 0, signal.SIGUSR2), (LAST, 1, signal.SIGTERM), (0, 0, 0)):
        if rank == world.rank and number:
            faults.on_encode[step] = lambda number=number: os.kill(os.getpid(), number)
        outcome = train(config, world)
        exports = sorted(path.name for path in folder.path.glob("*.pth.tar"))
        steps = [row["step"] for row in read_rows(config)]
        told.append([outcome.step, outcome.complete, outcome.signals, faults.num_encoded, faults.num_fitted])
        saved = checkpoint_format.step_of(checkpoint_format.newest_whole(folder.checkpoints))
        told[-1] += [saved, steps, exports] if world.rank == 0 else []
    return told


def test_a_signal_ends_an_evaluation_and_the_next_start_makes_up_for_it(two_epochs, tmp_path, losses, weights):
    configs = undisturbed, config = two_epochs("undisturbed"), two_epochs("run")
    told, log = run_two(train_with_signals, configs, tmp_path)
    half, best, latest = LAST // 2, "jepa-best.pth.tar", ["jepa-ep2.pth.tar", "jepa-latest.pth.tar"]
    # Student and teacher encode a batch on the rank that got the signal, and all 4 training batches on the other.
    first, second, third = zip(*told, strict=True)
    assert first == ([half, False, [signal.SIGUSR2], 2, 0, half, [], []], [half, False, [signal.SIGUSR2], 8, 0])
    done = [half - 1]
    assert second[0] == [LAST, False, [signal.SIGTERM], 8, 0, LAST, done, [best, *latest]]
    assert second[1] == [LAST, False, [signal.SIGTERM], 2, 0]
    assert third[0][:3] == third[1][:3] == [LAST, True, []]
    assert third[0][5:] == [LAST, [*done, LAST - 1], [best, *latest]]
    assert log.count("is ended by a stop signal; the next start makes up for it") == 2

    assert read_rows(config) == read_rows(undisturbed)
    assert losses(config) == losses(undisturbed)
    torch.testing.assert_close(weights(config), weights(undisturbed), rtol=0, atol=0)
    for name in (best, latest[-1]):
        found, expected = (read_checkpoint(Path(c.logging.folder, name)) for c in configs)
        assert found["loss"] == expected["loss"]
    assert found["loss"] == pytest.approx(np.mean(losses(config)[half:]), rel=1e-3)  # of the last epoch alone


def train_with_failures(world: World, faults: Faults, configs: list[Config]):
    """On rank 1, no probe can be fitted after the first epoch, and there is no memory after the second."""

    def lack_memory():
        raise torch.OutOfMemoryError("no memory left on purpose")

    if world.rank == 1:
        faults.on_fit[LAST // 2] = torch.linalg.LinAlgError("not converged on purpose")
        faults.on_encode[LAST] = lack_memory
    return train(configs[0], world).complete


def test_a_failure_on_one_rank_is_told_by_rank_0_and_the_run_goes_on(two_epochs, tmp_path):
    config = two_epochs("run")
    told, log = run_two(train_with_failures, [config], tmp_path)
    assert told == [True, True]
    (row,) = read_rows(config)
    assert row["step"] == LAST // 2 - 1
    # Rank 0 has measured the teacher, and rank 1 the student.
    assert {"eval/linear", "eval/linear_layout", "eval/miou", "eval/block1/linear"} <= row.keys()
    students = {name for name in row if name.startswith("eval/student/")}
    assert students == {"eval/student/block1/knn_10_layout", "eval/student/block1/knn_20_layout"}
    assert "(student not measured), linear" in log
    assert "WARNING k-NN and linear probe (student, block 2; student, block 1): not measured: LinAlgError: not" in log
    assert "WARNING segmentation (student, block 2; student, block 1): not measured: LinAlgError: not converged" in log
    assert (
        f"WARNING not evaluated after step {LAST}: OutOfMemoryError: no memory left on purpose; a lower "
        "evaluation.batch_size or evaluation.max_images needs less" in log
    )
