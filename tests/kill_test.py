"""Kill a training run again and again, and see that nothing is lost: `python tests/kill_test.py --kills 1000`.

A run of a tiny network is killed with SIGKILL: while it starts, between steps, and while it saves; all processes at
once, or one of them. After each kill the newest checkpoint must be whole and no older than the last one that was
published, and the next start must resume from it. Each run that reaches its end must have the losses and weights of a
run that was never killed, bit by bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image

import tests.helpers.tiny_architecture  # noqa: F401
from dmtjepa import checkpoint_format
from dmtjepa.config import Config, parse_config
from dmtjepa.training.launch import run_process

NUM_STEPS = 24
SAVE_EVERY = 3
MOMENTS = ("start", "step", "save", "save", "save")


def settings(folder: Path, images: Path, processes: int) -> Config:
    """24 steps with a checkpoint every 3."""
    return parse_config(
        {
            "data": {
                "batch_size": 8 // processes,
                "crop_size": 32,
                "root_path": str(images),
                "num_workers": 0,
                "loader": "torchvision",
            },
            "logging": {"folder": str(folder)},
            "mask": {"patch_size": 4, "min_keep": 4},
            "patch": {"local_agg_head": True},
            "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 16},
            "optimization": {"epochs": 3, "warmup": 1},
            "runtime": {"log_every": 1, "save_every_steps": SAVE_EVERY, "start_timeout": 600, "hang_timeout": 3600},
        }
    )


class Processes:
    """The processes of a run, forked from this one, which has imported everything and never computed."""

    def __init__(self, config: Config, count: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                _exit_with(lambda: run_process(config, "cpu"))
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether any process is still running; those that ended are collected."""
        self.pids = [pid for pid in self.pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        return bool(self.pids)

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def end(self, seconds: float) -> None:
        """Give the rest some seconds to notice that the others are gone, then kill them too."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.kill(self.pids)
        while self.poll():
            time.sleep(0.01)


def _exit_with(work: Callable[[], object]) -> None:
    """Run `work` in a forked child, and end it."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def same_result(first: Config, second: Config) -> bool:
    """Whether two finished runs have equal losses and equal weights, bit by bit."""
    if read_losses(first) != read_losses(second) or len(read_losses(first)) != NUM_STEPS:
        return False
    pid = os.fork()
    if pid == 0:

        def compare() -> None:
            old, new = (
                checkpoint_format.load_full(checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints")))
                for config in (first, second)
            )
            assert old.keys() == new.keys()
            # The generators' states are no result: each start of a loader draws from them a seed that nothing uses.
            assert all(torch.equal(old[name], new[name]) for name in old if not name.startswith("rng."))

        _exit_with(compare)
    return os.waitpid(pid, 0)[1] == 0


def read_losses(config: Config) -> list[str]:
    path = Path(config.logging.folder, "jepa_r0.csv")
    if not path.exists():
        return []
    with path.open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def wait_for_moment(moment: str, run: Processes, config: Config, generator: random.Random) -> bool:
    """Wait until the moment to kill; False when the run ended before."""
    checkpoints = Path(config.logging.folder, "checkpoints")
    if moment == "start":
        deadline = time.monotonic() + generator.uniform(0.0, 0.6)
        return _poll_until(run, lambda: time.monotonic() > deadline)
    if moment == "step":
        rows = len(read_losses(config)) + generator.randint(1, 2 * SAVE_EVERY)
        ready = _poll_until(run, lambda: len(read_losses(config)) >= rows)
        time.sleep(generator.uniform(0.0, 0.05))
        return ready
    for _ in range(generator.randint(0, 2)):  # saves to let pass
        before = newest_step(checkpoints)
        if not _poll_until(run, lambda: newest_step(checkpoints) > before):  # noqa: B023
            return False
    if not _poll_until(run, lambda: any(checkpoints.glob(".writing-*"))):
        return False
    time.sleep(generator.uniform(0.0, 0.15))
    return run.poll()


def newest_step(checkpoints: Path) -> int:
    """Steps of the newest published checkpoint; 0 without any."""
    return max(map(checkpoint_format.step_of, checkpoint_format.list_checkpoints(checkpoints)), default=0)


def _poll_until(run: Processes, condition: Callable[[], bool]) -> bool:
    while not condition():
        if not run.poll():
            return False
        time.sleep(0.001)
    return run.poll()


def last_start(config: Config) -> dict:
    return json.loads(Path(config.logging.folder, "environment.json").read_text())["starts"][-1]


def num_starts(config: Config) -> int:
    path = Path(config.logging.folder, "environment.json")
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dmtjepa-kill-"))
    images = folder / "images"
    images.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 5, 5, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).resize((32, 32), Image.BICUBIC).save(images / f"{index:02d}.png")

    reference = settings(folder / "reference", images, options.processes)
    run = Processes(reference, options.processes, folder / "reference.log")
    while run.poll():
        time.sleep(0.05)
    if len(read_losses(reference)) != NUM_STEPS:
        print((folder / "reference.log").read_text())
        return 1

    kills: Counter[str] = Counter()
    torn = runs = 0
    begun = time.monotonic()
    while sum(kills.values()) < options.kills:
        runs += 1
        config = settings(folder / f"run-{runs}", images, options.processes)
        checkpoints = Path(config.logging.folder, "checkpoints")
        log = folder / f"run-{runs}.log"
        expected: int | None = None  # the step that the next start must resume from
        while True:
            starts = num_starts(config)
            run = Processes(config, options.processes, log)
            moment = generator.choice(MOMENTS)
            killing = sum(kills.values()) < options.kills and wait_for_moment(moment, run, config, generator)
            if killing:
                published = newest_step(checkpoints)
                victims = list(run.pids) if generator.random() < 0.7 else [generator.choice(run.pids)]
                run.kill(victims)
                run.end(seconds=5)
                kills[moment] += 1
                torn += any(checkpoints.glob(".writing-*"))
            else:
                while run.poll():
                    time.sleep(0.01)
            started = num_starts(config) > starts
            if started and expected is not None and last_start(config)["step"] != expected:
                return _fail(f"resumed from step {last_start(config)['step']} instead of {expected}", log)
            if not killing:
                break
            found = checkpoint_format.newest_whole(checkpoints)
            expected = 0 if found is None else checkpoint_format.step_of(found)
            if expected < published:
                return _fail(f"step {published} was published, but the newest whole checkpoint is {found}", log)
            rows = len(read_losses(config))
            # A save goes on while the next interval is trained.
            if rows - expected > 2 * SAVE_EVERY:
                return _fail(f"{rows} steps were done, but the newest checkpoint has {expected}", log)
        if not same_result(reference, config):
            return _fail("losses or weights differ from those of the run that was not killed", log)
        shutil.rmtree(config.logging.folder)
        print(f"{sum(kills.values())} kills ({dict(kills)}), {runs} runs ended right", flush=True)
    seconds = time.monotonic() - begun
    print(
        f"{sum(kills.values())} kills of {options.processes} processes in {seconds:.0f} s: {dict(kills)}; {torn} left "
        f"a half-written checkpoint; {runs} runs, each with the losses and weights of the one never killed"
    )
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


def _fail(reason: str, log: Path) -> int:
    print(f"FAILED: {reason}\n--- {log}\n{log.read_text()[-6000:]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
