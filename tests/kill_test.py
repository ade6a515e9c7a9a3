"""Kill programs again and again, and see that nothing is lost: `python -m tests.kill_test --kills 300 --out FILE.json`.

Runs of a tiny network, of one and two processes, with both loaders and their workers, get SIGKILL, SIGTERM, SIGINT or
SIGHUP: a rank, the program or its whole process group; while they start, between steps, while they log, save or export.
Finished runs are evaluated, and the evaluation is killed too. After each kill:

- every process of the program ends;
- the newest checkpoint is whole, and no older than the last one that was published; a stop signal saved every step;
- the losses of all steps before it are in the CSV of each rank, and no exported file is lost or damaged;
- the next start, at once, resumes from that checkpoint.

Each run ends with the losses, weights and exported files of a run that was never killed, bit by bit.

The results are in FILE.json after each run. The same command continues where an earlier one was ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from dmtjepa.data.build import is_dali_installed
from dmtjepa.files import WRITING, write_json
from tests.helpers.killed_runs import (
    NUM_STEPS,
    SAVE_EVERY,
    Lost,
    Run,
    Setup,
    check_same_result,
    digest,
    require,
    write_images,
)
from tests.helpers.programs import Program, fork_instead_of_import

KILLS_PER_RUN = 10
EVALUATE_EVERY, EVALUATION_KILLS = 5, 3  # an evaluation takes longer than a run
END_SECONDS = 60  # only ends a hang
LEFT_SECONDS = 10  # after the program has ended, for those that it started

MOMENTS = ("start", "step", "log", "save", "save", "export")
KILLS = (
    (signal.SIGKILL, "a rank"), (signal.SIGKILL, "main.py"), (signal.SIGKILL, "the group"),
    (signal.SIGTERM, "main.py"), (signal.SIGTERM, "the group"), (signal.SIGINT, "main.py"),
    (signal.SIGINT, "the group"), (signal.SIGHUP, "main.py"), (signal.SIGHUP, "the group"),
)  # fmt: skip
WEIGHTS = [2, 2, 2, 1, 1, 1, 1, 1, 1]
SETUPS = (Setup(2, "pil", 1), Setup(1, "dali", 2), Setup(1, "pil", 2), Setup(2, "dali", 2))


# ---- When to kill, and what


def wait_for_moment(moment: str, run: Run, program: Program, seconds: float, generator: random.Random) -> bool:
    """Wait until the moment to kill; False when the program ended before. `seconds`: what a start takes."""
    if moment == "start":
        end = program.started + generator.uniform(0, 1.2 * seconds)
        return program.wait_until(lambda: time.monotonic() > end)
    if moment == "step":
        rows = len(run.losses()) + generator.randint(1, 2 * SAVE_EVERY)
        program.wait_until(lambda: len(run.losses()) >= rows)
        time.sleep(generator.uniform(0, 0.05))
        return program.is_running()
    if moment == "log":
        path = run.files.csv_file(generator.randrange(run.setup.processes))
        for _ in range(generator.randint(1, SAVE_EVERY)):
            before = size_of(path)
            if not program.wait_until(lambda: size_of(path) > before):  # noqa: B023
                return False
        return program.is_running()
    if moment == "export":
        ready = program.wait_until(lambda: any(run.files.path.glob(f"{WRITING}*.pth.tar*")))
        time.sleep(generator.uniform(0, 0.02))
        return ready and program.is_running()
    for _ in range(generator.randint(0, 2)):  # saves to let pass
        before = run.newest_published()
        if not program.wait_until(lambda: run.newest_published() > before):  # noqa: B023
            return False
    ready = program.wait_until(lambda: any(run.files.checkpoints.glob(f"{WRITING}*")))
    time.sleep(generator.uniform(0, 0.15))
    return ready and program.is_running()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill(program: Program, number: signal.Signals, target: str, generator: random.Random) -> None:
    with contextlib.suppress(ProcessLookupError):
        if target == "the group":
            os.killpg(program.pid, number)
        else:
            os.kill(generator.choice(program.ranks()) if target == "a rank" else program.pid, number)


def check_ended(program: Program) -> float:
    """Wait until a killed program has ended. Returns the seconds it took."""
    killed = time.monotonic()
    if not program.wait(END_SECONDS):
        raise Lost(f"still runs {END_SECONDS} s later: {[row.name for row in program.members()]}")
    return time.monotonic() - killed


def check_none_left(program: Program) -> None:
    """Every process of a program that has ended is gone, or soon will be."""
    deadline = time.monotonic() + LEFT_SECONDS
    while left := program.members():
        if time.monotonic() > deadline:
            raise Lost(f"processes are left {LEFT_SECONDS} s later: {[f'{row.name} {row.pid}' for row in left]}")
        time.sleep(0.01)


# ---- One run, killed until it ends


class Campaign:
    """All runs, and what came of them.

    Args:
        folder: where to write.
        seed: of the moments to kill at.
        results: of earlier runs of the same campaign.
    """

    def __init__(self, folder: Path, seed: int, results: dict) -> None:
        self.folder, self.seed, self.results = folder, seed, results
        self.images = folder / "images"
        shutil.rmtree(self.images, ignore_errors=True)
        write_images(self.images)
        self._references: dict[Setup, tuple[Run, float]] = {}
        self._evaluation_seconds: float | None = None

    def reference(self, setup: Setup) -> tuple[Run, float]:
        """A run that is never killed, and the seconds to its first row."""
        if setup not in self._references:
            name = f"reference-{setup.processes}-{setup.loader}"
            shutil.rmtree(self.folder / name, ignore_errors=True)
            run = Run(self.folder / name, self.images, setup)
            program = run.train()
            program.wait_until(lambda: bool(run.losses()))
            seconds = time.monotonic() - program.started
            program.wait(600)
            if program.code != 0:
                raise SystemExit(f"the run that is not killed failed:\n{run.log.read_text()[-6000:]}")
            check_none_left(program)
            self._references[setup] = run, seconds
        return self._references[setup]

    def evaluation_seconds(self) -> float:
        """What the evaluation of a run takes that is not killed."""
        if self._evaluation_seconds is None:
            run, _ = self.reference(SETUPS[0])
            program = run.evaluate()
            program.wait(600)
            if program.code != 0:
                raise SystemExit(f"the evaluation that is not killed failed:\n{run.log.read_text()[-6000:]}")
            self._evaluation_seconds = time.monotonic() - program.started
        return self._evaluation_seconds

    def run(self, number: int, kills_left: int) -> None:
        """Kill a run until it ends, and then its evaluation. Adds a row to the results."""
        generator = random.Random(1000 * self.seed + number)
        setup = SETUPS[number % len(SETUPS)]
        name = f"run-{number}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        run = Run(self.folder / name, self.images, setup)
        row: dict = {"run": number, "setup": str(setup), "kills": [], "failure": None}
        program: list[Program] = []  # the one that runs now
        started = time.monotonic()
        try:
            self._train(run, row["kills"], min(kills_left, KILLS_PER_RUN), generator, program)
            if number % EVALUATE_EVERY == 0 and kills_left > len(row["kills"]):
                most = min(kills_left - len(row["kills"]), EVALUATION_KILLS)
                self._evaluate(run, row["kills"], most, generator, program)
            for path in (run.files.path, run.settings, run.log):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except Exception as error:  # the campaign goes on
            row["failure"] = f"{error}" if isinstance(error, Lost) else repr(error)
            row["log"] = run.log.read_text(errors="replace")[-3000:] if run.log.exists() else ""
        finally:
            for one in program:
                one.kill_all()
        row["seconds"] = round(time.monotonic() - started, 1)
        self.results["runs"].append(row)

    def _train(self, run: Run, kills: list, most: int, generator: random.Random, current: list[Program]) -> None:
        reference, start_seconds = self.reference(run.setup)
        expected: int | None = None  # the step that the next start must resume from
        while True:
            starts = len(run.files.read_starts())
            table = run.table()
            current[:] = [*current, run.train()]
            program = current[-1]
            for earlier in current[:-1]:  # the restart did not wait for them
                check_none_left(earlier)
            current[:] = [program]
            moment = generator.choice(MOMENTS)
            killing = len(kills) < most and wait_for_moment(moment, run, program, start_seconds, generator)
            if killing:
                before = (run.newest_published(), table, run.exports())
                number, target = generator.choices(KILLS, WEIGHTS)[0]
                row = {"program": "train", "moment": moment, "signal": number.name, "target": target}
                kills.append(row)
                kill(program, number, target, generator)
                row["seconds_to_end"] = round(check_ended(program), 3)
                row["half_written"] = any(run.files.path.rglob(f"{WRITING}*"))
            else:
                check_ended_by_itself(program)
            now = run.files.read_starts()
            if len(now) > starts and expected is not None:
                require(now[-1]["step"] == expected, f"resumed from step {now[-1]['step']} instead of {expected}")
            if not killing:
                check_none_left(program)
                check_same_result(reference, run)
                return
            expected = self._check_killed(run, reference, program, number, *before)

    def _check_killed(
        self, run: Run, reference: Run, program: Program, number: signal.Signals, published: int, table: str,
        exports: set[str],
    ) -> int:  # fmt: skip
        """Nothing is lost. Returns the step that the next start must resume from.

        Args:
            published: newest step that was published before the kill.
            table: the CSV before the program started. After a SIGKILL it may have rows beyond the checkpoint.
            exports: names of the exported files before the kill.
        """
        whole = run.newest_whole()
        require(whole >= published, f"step {published} was published, but the newest whole checkpoint is of {whole}")
        for rank in range(run.setup.processes):
            losses = run.losses(rank)
            require(len(losses) >= whole, f"rank {rank} has {len(losses)} rows before step {whole}")
            require(losses == reference.losses(rank)[: len(losses)], f"other losses in the CSV of rank {rank}")
        # A save goes on while the next interval is trained.
        require(len(run.losses()) - whole <= 2 * SAVE_EVERY, f"{len(run.losses())} rows, but a checkpoint of {whole}")
        run.check_files(exports)
        if number != signal.SIGKILL:
            expected = {-number, 128 + number} | ({0} if whole == NUM_STEPS else set())
            require(program.code in expected, f"ended with {program.code} after {number.name}")
            if run.table() != table:  # it has trained
                require(whole == len(run.losses()), f"{number.name} saved {whole} of {len(run.losses())} steps")
        return whole

    def _evaluate(self, run: Run, kills: list, most: int, generator: random.Random, current: list[Program]) -> None:
        seconds = self.evaluation_seconds()
        before = digest(run.files.path)
        for _ in range(most):
            current[:] = [run.evaluate()]
            end = current[0].started + generator.uniform(0, seconds)
            if current[0].wait_until(lambda: time.monotonic() > end):  # noqa: B023
                number, target = generator.choice([one for one in KILLS if one[1] != "a rank"])
                row = {"program": "evaluation", "moment": "evaluation", "signal": number.name, "target": target}
                kills.append(row)
                kill(current[0], number, target, generator)
                row["seconds_to_end"] = round(check_ended(current[0]), 3)
                row["half_written"] = any(run.files.path.rglob(f"{WRITING}*"))
            check_none_left(current[0])
            run.check_files(run.exports())
            require(digest(run.files.path) == before, "an evaluation changed files of the run")
        current[:] = [run.evaluate()]
        check_ended_by_itself(current[0])
        check_none_left(current[0])
        require((run.files.report / "report.json").exists(), "no report.json")


def check_ended_by_itself(program: Program) -> None:
    if not program.wait(600):
        raise Lost("does not end")
    require(program.code == 0, f"a start that was not killed ended with {program.code}")


# ---- The command


def summarize(results: dict) -> str:
    """A table of the kills by kind, and what fell short."""
    kinds: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in results["runs"]:
        for one in row["kills"]:
            kinds[one["moment"], f"{one['signal']} to {one['target']}"].append(one)
    lines = [f"{'moment':<12}{'kill':<24}{'kills':>6}{'half-written':>14}{'median s':>10}{'longest s':>11}"]
    for (moment, how), rows in sorted(kinds.items()):
        seconds = [row.get("seconds_to_end", float("nan")) for row in rows]
        torn = sum(row.get("half_written", False) for row in rows)
        median, longest = statistics.median(seconds), max(seconds)
        lines.append(f"{moment:<12}{how:<24}{len(rows):>6}{torn:>14}{median:>10.2f}{longest:>11.2f}")
    failures = [row for row in results["runs"] if row["failure"]]
    for row in failures:
        last = row["kills"][-1] if row["kills"] else {}
        lines.append(f"FAILED: run {row['run']} ({row['setup']}), after {last}: {row['failure']}")
    seconds = sum(row["seconds"] for row in results["runs"])
    lines.append(
        f"{count_kills(results)} kills of {len(results['runs'])} runs in {seconds:.0f} s; "
        f"{len(results['runs']) - len(failures)} runs lost nothing, {len(failures)} fell short"
    )
    return "\n".join(lines)


def count_kills(results: dict) -> int:
    return sum(len(row["kills"]) for row in results["runs"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="file of the results (JSON); a campaign that was ended continues")
    options = parser.parse_args()
    results: dict = {"seed": options.seed, "runs": []}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
        if results["seed"] != options.seed:
            parser.error(f"{options.out} has the results of seed {results['seed']}")
    if is_dali_installed():
        import dmtjepa.data.loaders.dali  # noqa: F401
    import torch._dynamo  # noqa: F401  # which every program needs

    fork_instead_of_import()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dmtjepa-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(folder, options.seed, results)
    while count_kills(results) < options.kills:
        number = len(results["runs"])
        campaign.run(number, options.kills - count_kills(results))
        if options.out is not None:
            write_json(options.out, results)
        row = results["runs"][-1]
        print(
            f"run {number} ({row['setup']}): {len(row['kills'])} kills in {row['seconds']} s, "
            f"{row['failure'] or 'nothing lost'}; {count_kills(results)} of {options.kills}",
            flush=True,
        )
    print(summarize(results))
    failed = any(row["failure"] for row in results["runs"])
    if options.folder is None and not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
