"""What the implementations of the operators share: starting a Triton kernel, and the sizes of blocks.

Triton compiles a kernel again when an integer argument becomes 1 or a multiple of 16, or ceases to be one. Sizes that
depend on the masks of a step are exempt (`do_not_specialize`), so that training compiles nothing after its first step.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

# Elements of a block on the CPU: a few float32 arrays of this size stay within a core's L2 cache.
CPU_BLOCK_ELEMENTS = 2**16

# `a * b + c` is rounded once (FMA), whatever Triton's default is: it changes with Triton 3.10, and 3.9 warns of that.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: triton.JITFunction, num_programs: int, *arguments, **constants) -> None:
    """Runs `num_programs` programs of `kernel` on the device of its first argument; does nothing for 0 programs."""
    if num_programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(num_programs,)](*arguments, **OPTIONS, **constants)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if the elements of its last dimension are adjacent, as vector loads need, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_columns(num_columns: int, itemsize: int, bytes_per_row: int) -> int:
    """Columns of a Triton block: a power of two that spans `bytes_per_row`, or less for shorter rows."""
    return min(triton.next_power_of_2(num_columns), bytes_per_row // itemsize)


def cpu_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices that split `num_rows` rows into blocks of at most CPU_BLOCK_ELEMENTS elements, at least one row each."""
    size = max(1, CPU_BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, size):
        yield slice(start, start + size)
