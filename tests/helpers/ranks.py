"""Run a function on several processes that can form a group, and see how each of them ends."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def run_ranks(function: Callable[..., object], count: int, folder: Path, *arguments: object) -> list[tuple[int, str]]:
    """`function(*arguments)` on `count` processes; returns the exit code of each and what it wrote to stderr."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
    context = multiprocessing.get_context("forkserver")
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = [
        context.Process(target=_run, args=(function, arguments, rank, count, store.port, log))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)  # only ends a hang
        process.kill()
        process.join()
    return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _run(function: Callable[..., object], arguments: tuple, rank: int, count: int, port: int, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        function(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
