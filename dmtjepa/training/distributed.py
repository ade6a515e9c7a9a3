"""The process group of a run: its start, and the failure that came first."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dmtjepa.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A failed rank that serves the store ends this much later. Watchdogs read the store every 5 seconds.
STORE_SECONDS = 12.0


class DistributedError(UserError, RuntimeError):
    """The processes of a run could not form a group, or another rank failed; the message names rank and host."""


class LostPeer(DistributedError):
    """Another rank ended without a message: its process was killed or its node lost."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    timeout: timedelta = timedelta(days=30)
    """Of collectives: no limit. The watchdog ends a hang. The clock of a limit goes on while a job is suspended."""

    @property
    def name(self) -> str:
        """For messages, e.g. `rank 3 of 16 on node2`."""
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def read_rank() -> tuple[int, int]:
    """Rank and number of processes, from RANK and WORLD_SIZE. A process without RANK trains alone.

    Raises:
        DistributedError: some of the variables that describe the group are missing, or are no such numbers.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if not given["RANK"]:
        if given["WORLD_SIZE"] not in ("", "1"):
            raise DistributedError(
                f"WORLD_SIZE={given['WORLD_SIZE']} is set and RANK is not: unset WORLD_SIZE to train on this machine, "
                "or let torchrun or srun start the processes"
            )
        return 0, 1
    missing = [name for name in names if not given[name]]
    if missing:
        raise DistributedError(
            f"RANK={given['RANK']} is set and {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not: unset "
            "RANK to train on this machine, or let torchrun or srun start the processes"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not given[name].isascii() or not given[name].isdecimal():
            raise DistributedError(f"{name}={given[name]} is not a number")
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world_size:
        raise DistributedError(f"RANK={rank} is not one of the ranks 0 to {world_size - 1} of WORLD_SIZE={world_size}")
    return rank, world_size


@contextlib.contextmanager
def process_group(device: torch.device, *, start_timeout: float, hang_timeout: float) -> Iterator[World]:
    """Initialise the default process group, and destroy it at the end.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe the group: main.py, torchrun or main_distributed.py set
    them. A process without RANK trains alone. Gloo serves CPUs, NCCL serves GPUs. All ranks have exchanged a number
    before this returns, so a broken network shows here, on every rank.

    Args:
        device: where this process computes.
        start_timeout: seconds within which all processes must start.
        hang_timeout: seconds within which the first collective must end. The watchdog watches the later ones.

    Raises:
        DistributedError: not all processes started in time, or a variable is missing.
    """
    rank, world_size = read_rank()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if device.type == "cuda":
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            # The number of context patches differs from step to step: blocks of fixed size would leave gaps.
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(device)
    try:
        store = _connect_store(rank, timedelta(seconds=start_timeout))
        world = World(rank, world_size, device, store)
        _wait_for_all(world, start_timeout)
        _init_process_group(world, timedelta(seconds=1.5 * hang_timeout + 30))
    except (KeyError, RuntimeError, ValueError, OSError) as error:  # torch.distributed's are RuntimeErrors
        raise DistributedError(
            f"rank {rank} of {world_size} on {socket.gethostname()} could not join the run at {address} "
            f"within {start_timeout:g} s (runtime.start_timeout): {error}"
        ) from error
    try:
        yield world
    except BaseException:
        if device.type == "cuda" and world_size > 1:
            # NCCL waits for the other ranks to destroy their half, which they never will.
            atexit.register(_end_at_once)
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _connect_store(rank: int, timeout: timedelta) -> dist.Store:
    """The store of the run, which rank 0 serves unless torchrun or main.py does. A process alone has its own."""
    if not os.environ.get("RANK"):
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=_serves_store(rank), wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _serves_store(rank: int) -> bool:
    """Whether the store ends with this process: under SLURM with rank 0, otherwise with torchrun or main.py."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _init_process_group(world: World, timeout: timedelta) -> None:
    """Initialise the default group, and add up a number over all ranks to see within `timeout` that it works."""
    on_cuda = world.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("group", world.store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        device_id=world.device if on_cuda else None,
    )
    total = torch.ones(1, device=world.device)
    dist.all_reduce(total)
    if int(total) != world.world_size:
        raise DistributedError(f"the first sum over all ranks is {int(total)}")
    set_timeout(world.timeout)


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    """Set the timeout of the collectives of a group, by default of the group of all ranks."""
    # Public in newer versions of PyTorch, which warn of the private name.
    change = getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timeout, group)


def new_gloo_group(world: World) -> dist.ProcessGroup:
    """A group of all ranks for communication between their hosts. All ranks must call this in the same order."""
    group = dist.new_group(backend="gloo", timeout=world.timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def run_on_rank_0(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on all ranks. All ranks raise its exception."""
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


def _end_at_once() -> None:
    """End this process, which has failed, without destroying its process group."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _wait_for_all(world: World, timeout: float) -> None:
    """Wait until every rank has written its host into the store. Raises DistributedError with the missing ranks."""
    world.store.set(f"host/{world.rank}", socket.gethostname())
    deadline = time.monotonic() + timeout
    missing = list(range(world.world_size))
    while missing:
        missing = [rank for rank in missing if not world.store.check([f"host/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise DistributedError(f"ranks {missing} have not come")
        if missing:
            time.sleep(0.05)


@contextlib.contextmanager
def first_failure(world: World) -> Iterator[None]:
    """Make every rank report the failure that came first, not the broken connections that follow from it.

    The first rank that fails keeps its exception. The others raise a DistributedError that quotes it, or LostPeer if a
    rank ended without a message.
    """
    try:
        yield
    except Exception as error:
        text = f"{world.name} failed first: {type(error).__name__}: {error}"
        lost = world.world_size > 1 and _is_broken_connection(error)
        try:
            first = _read_failure(world) if lost else _write_failure(world, text)
        except RuntimeError:  # the rank that serves the store is gone
            first = None if lost else text
        if first is None:
            raise LostPeer(f"{world.name} lost another rank, which ended without a message: {error}") from None
        if first != text:
            raise DistributedError(f"{world.name} stopped, since {first}") from None
        if world.world_size > 1 and _serves_store(world.rank):
            time.sleep(STORE_SECONDS)  # let the others read this
        raise


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone. Failures of gloo have no type of their own."""
    if isinstance(error, OSError):  # of a file or pipe of this process
        return False
    gone = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return gone or any(word in str(error) for word in ("gloo", "Connection closed", "Connection reset", "Broken pipe"))


def _write_failure(world: World, text: str) -> str:
    """Record the failure of this rank, unless there is one already. Returns the first one."""
    return world.store.compare_set("failure", "", text).decode()


def _read_failure(world: World) -> str | None:
    """The failure that another rank has recorded, which it does before its connections close."""
    for _ in range(10):
        failure = find_failure(world.store)
        if failure is not None:
            return failure
        time.sleep(0.1)
    return None


def find_failure(store: dist.Store) -> str | None:
    """The failure that a rank has recorded, if there is one. Raises RuntimeError if the store is gone."""
    return store.get("failure").decode() if store.check(["failure"]) else None
