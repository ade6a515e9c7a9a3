"""What the launchers of the operators share: starting a kernel on its tensors' device, and block sizes.

Triton compiles a kernel again where an integer becomes 1 or a multiple of 16, or ceases to be; sizes that follow the
masks of a step are exempt (`do_not_specialize`), so that nothing is compiled amid a run.
"""

import torch
import triton
from torch import Tensor


def launch(kernel: triton.JITFunction, num_programs: int, *arguments, **constants) -> None:
    """Runs `kernel` as `num_programs` programs on the device of its first argument; none where there is no work."""
    if num_programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(num_programs,)](*arguments, **constants)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if the elements of a row are adjacent, as vector loads need, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_columns(num_columns: int, itemsize: int, bytes_per_row: int) -> int:
    """Columns of a tile: a power of two that spans `bytes_per_row`, fewer where the rows are shorter."""
    return min(triton.next_power_of_2(num_columns), bytes_per_row // itemsize)
