"""Processes of a run: how they join, agree, are told to stop, and are reported when they stand still."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class DeviceError(ValueError):
    """A device that this machine does not have."""


class DistributedError(RuntimeError):
    """The processes of a run could not join, or stand still; the message names the rank and host."""


class LostPeer(DistributedError):
    """Another rank ended without a message: its process was killed or its node lost."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    timeout: timedelta  # of collectives; PyTorch's own 30 minutes hold for a group that is made without it

    @property
    def name(self) -> str:
        """For messages, e.g. `rank 3 of 16 on node2`."""
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def parse_device(name: str) -> torch.device:
    """The device called `name`, `cpu`, `cuda` or `cuda:N`, of whatever machine. Raises DeviceError for other names."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r}: training runs on cpu or cuda")
    return torch.device("cpu") if device.type == "cpu" else device


def check_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; plain `cuda` is the GPU numbered `local_rank`, or the only one that is visible.

    Raises DeviceError where this machine has no such device.
    """
    device = parse_device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(f"device {name!r}: this machine has no usable CUDA device; pass --devices cpu")
    index = device.index if device.index is not None else local_rank if count > 1 else 0
    if index >= count:
        raise DeviceError(f"device cuda:{index}: this machine has {count} CUDA devices, numbered from 0")
    return torch.device("cuda", index)


@contextlib.contextmanager
def joined(device: torch.device, *, start_timeout: float, hang_timeout: float) -> Iterator[World]:
    """Join the process group and leave it again.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who this is (as set by main.py, torchrun or main_distributed.py);
    without RANK the process trains alone. Gloo serves CPUs, NCCL GPUs. Every pair of neighbours has exchanged a number
    before this returns, so a network that does not work shows here and on every rank.

    Args:
        device: where this process computes.
        start_timeout: seconds within which all processes must have come.
        hang_timeout: seconds after which a collective may give up; the watchdog reports before that.

    Raises:
        DistributedError: not all came in time.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    start = timedelta(seconds=start_timeout)
    if device.type == "cuda":
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            # The number of context patches differs from step to step: blocks of fixed size would leave gaps.
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(device)
    try:
        if "RANK" in os.environ:
            served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, or by main.py
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            master = rank == 0 and not served
            store = dist.TCPStore(host, port, is_master=master, wait_for_workers=False, timeout=start)
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        else:
            store = dist.HashStore()
        world = World(rank, world_size, device, store, timedelta(seconds=1.5 * hang_timeout + 30))
        _wait_for_all(world, start_timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=world.timeout,
            device_id=device if device.type == "cuda" else None,
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if int(total) != world_size:
            raise DistributedError(f"the first sum over all ranks is {int(total)}")
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


def _end_at_once() -> None:
    """End this process, which has failed, without the teardown of its process group."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _wait_for_all(world: World, timeout: float) -> None:
    """Wait until every rank has written its host into the store; name those that are missing."""
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
    """Let every rank end with the failure that came first, not with the broken connections that follow from it.

    The first rank that fails keeps its exception. The others raise a DistributedError that quotes it, or LostPeer where
    a rank vanished without a word.
    """
    try:
        yield
    except Exception as error:
        text = f"{world.name} failed first: {type(error).__name__}: {error}"
        try:
            first = _read_failure(world) if _is_broken_connection(error) else _write_failure(world, text)
        except RuntimeError:  # the rank that serves the store is gone
            first = None if _is_broken_connection(error) else text
        if first is None:
            raise LostPeer(f"{world.name} lost another rank, which ended without a message: {error}") from None
        if first != text:
            raise DistributedError(f"{world.name} stopped, since {first}") from None
        if world.rank == 0 and world.world_size > 1:
            time.sleep(2)  # under SLURM rank 0 serves the store: let the others read this
        raise


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed for want of its partners; gloo's failures have no type of their own."""
    gone = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return gone or any(word in str(error) for word in ("gloo", "Connection closed", "Connection reset", "Broken pipe"))


def _write_failure(world: World, text: str) -> str:
    """Note the failure of this rank, unless there is one already; returns the one that was first."""
    return world.store.compare_set("failure", "", text).decode()


def _read_failure(world: World) -> str | None:
    """The failure that another rank has noted, which it does before its connections close."""
    for _ in range(10):
        if world.store.check(["failure"]):
            return world.store.get("failure").decode()
        time.sleep(0.1)
    return None


class Agreement:
    """Lets all ranks act on the same step on what one of them wishes, without making any of them wait.

    Wishes travel by gloo between the hosts while the next step is computed: what is wished at one exchange is
    known to all at the next.
    """

    CONTINUE, STOP, FAIL = range(3)

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._value = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def exchange(self, wish: int) -> int:
        """Send this rank's wish; returns the strongest wish of the previous exchange, the same on all ranks."""
        agreed = self.finish()
        self._value = torch.tensor([wish])
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def finish(self) -> int:
        """The strongest wish of the last exchange."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)
