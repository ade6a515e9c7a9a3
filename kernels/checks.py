"""Argument checks shared by the operators. They raise before a kernel is launched.

Messages are formatted only on failure, so that a check does not make `torch.compile` specialise on a dynamic size.
Values are checked in debug mode only (`DMTJEPA_DEBUG=1`), because reading an index makes the host wait for the device.
"""

import os

import torch
from torch import Tensor

DEBUG = os.environ.get("DMTJEPA_DEBUG", "0") == "1"

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensor(name: str, tensor: Tensor, dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless `tensor` has `dim` dimensions, TypeError unless its dtype is one of `dtypes`."""
    if tensor.ndim != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {expected}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """Raises ValueError unless `tensor` has the shape `expected`; `letters` names it in the message, as in "[U, D]"."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {letters} = {list(expected)}, got {list(tensor.shape)}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} is {tensor.dtype} but {other_name} is {other.dtype}: cast one of them")


def check_same_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Raises ValueError unless every tensor lies on the device of `first`, and that device is the CPU or CUDA."""
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{first_name} is on {first.device}: the operators run on cpu and cuda")
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}: move one of them")


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError for float64 on CUDA: the Triton kernels accumulate in float32 and would silently round it."""
    if tensor.dtype == torch.float64 and tensor.device.type == "cuda":
        raise TypeError(f"{name} is float64: the Triton kernels accumulate in float32; use dmtjepa.kernels.plain")


def check_window(grid_size: tuple[int, int], num_neighbors: int, window: int, border: str) -> None:
    """Raises ValueError unless an odd `window` fits on the grid and has `num_neighbors` candidates, at most 8."""
    rows, cols = grid_size
    if window not in (3, 5, 7):
        raise ValueError(f"window must be 3, 5 or 7, got {window}")
    if window > min(rows, cols):
        raise ValueError(f"window {window} is larger than the grid of {rows} x {cols} patches: use a smaller window")
    if not 1 <= num_neighbors <= 8:
        raise ValueError(f"num_neighbors must be between 1 and 8, which a window of 3 holds, got {num_neighbors}")
    if border not in ("wrap", "clip"):
        raise ValueError(f'border must be "wrap" or "clip", got {border!r}')


def debug_check_index(name: str, index: Tensor, size: int, lowest: int = 0) -> None:
    """In debug mode, raises IndexError unless every entry of `index` lies in [lowest, size)."""
    if not DEBUG or index.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in index.aminmax())
    if smallest < lowest or largest >= size:
        raise IndexError(f"{name} has entries in [{smallest}, {largest}], outside [{lowest}, {size - 1}]")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
