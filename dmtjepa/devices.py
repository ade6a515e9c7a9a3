"""The devices of this machine, by name."""

from __future__ import annotations

import gc

import torch

from dmtjepa.errors import UserError


class DeviceError(UserError, ValueError):
    """A device that this machine does not have."""


def parse_device(name: str) -> torch.device:
    """The device called `name`, `cpu`, `cuda` or `cuda:N`, of whatever machine. Raises DeviceError for other names."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r}: dmtjepa runs on cpu or cuda")
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
        raise DeviceError(f"device {name!r}: this machine has no usable CUDA device; use cpu instead")
    index = device.index if device.index is not None else local_rank if count > 1 else 0
    if index >= count:
        raise DeviceError(f"device cuda:{index}: this machine has {count} CUDA devices, numbered from 0")
    return torch.device("cuda", index)


def find_device(name: str) -> torch.device | None:
    """The device called `name` (see `check_device`), or None where this machine does not have it."""
    try:
        return check_device(name)
    except DeviceError:
        return None


def release_memory(device: torch.device) -> None:
    """Free compiled code and the memory of models that are not used any more.

    Models that are sharded or compiled refer to themselves, so they stay until Python looks for such objects.
    """
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
