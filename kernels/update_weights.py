"""update_weights: AdamW, the moving average of the teacher, and copies of both in another dtype, in one pass.

Not an operator of PyTorch: it changes weights in place, and nothing compiles or differentiates it. A table on the
device says where they lie, so that one launch updates any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_same_device, check_shape
from .launch import launch

BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass(frozen=True)
class Weight:
    """A weight and what is updated with it: contiguous tensors of one shape, float32 except the copies.

    `average` and `square_average` are AdamW's; None for a weight that is not trained. `teacher`, `copy` and
    `teacher_copy` are None where there are none. All copies of a table have one dtype.
    """

    weight: Tensor
    average: Tensor | None = None
    square_average: Tensor | None = None
    decayed: bool = False
    teacher: Tensor | None = None
    copy: Tensor | None = None
    teacher_copy: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """The tensors in the order of the table's columns."""
        return [value for field in fields(self) if not isinstance(value := getattr(self, field.name), bool)]


# Each of 128 threads has a 16-byte load of each of 5 tensors in flight, 8 times. Blocks of 1024 need 240 registers.
_BLOCK = 512
_CHUNK = 4096
_BETA1, _BETA2, _EPS = tl.constexpr(BETAS[0]), tl.constexpr(BETAS[1]), tl.constexpr(EPS)
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_like(name: str, tensor: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    check_shape(name, tensor, weight.shape, "that of its weight")
    check_same_device("weight", weight, **{name: tensor})
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {list(tensor.shape)} must be contiguous")


def _check(weights: Sequence[Weight]) -> torch.dtype:
    """Check the weights of a table. Returns the dtype of their copies."""
    if not weights:
        raise ValueError("a table must have at least one weight")
    copies = [copy for w in weights for copy in (w.copy, w.teacher_copy) if copy is not None]
    copy_dtype = copies[0].dtype if copies else torch.bfloat16
    if copy_dtype not in _TRITON_DTYPES:
        raise TypeError(f"copies must be bfloat16, float16 or float32, got {copy_dtype}")
    for w in weights:
        check_same_device("the first weight", weights[0].weight, weight=w.weight)
        if (w.average is None) != (w.square_average is None):
            raise ValueError("a weight must have both averages of AdamW or none")
        if w.teacher_copy is not None and w.teacher is None:
            raise ValueError("teacher_copy needs a teacher")
        for field in fields(w):
            value = getattr(w, field.name)
            if isinstance(value, Tensor):
                dtype = copy_dtype if field.name.endswith("copy") else torch.float32
                _check_like(field.name, value, w.weight, dtype)
    return copy_dtype


class WeightTable:
    """Weights of one device, for `update_weights`. The tensors must stay where they are.

    Raises:
        TypeError, ValueError: a tensor has another dtype, shape or device than it must have, or is not contiguous.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.copy_dtype = _check(weights)
        self.weights = list(weights)
        self.gradients: list[Tensor | None] = [None] * len(weights)
        device = weights[0].weight.device
        num_programs = torch.tensor([triton.cdiv(w.weight.numel(), _CHUNK) for w in weights])
        self.first_program = [0, *num_programs.cumsum(0).tolist()]
        addresses = [list(map(_address, w.tensors())) for w in weights]
        self.aligned = all(address % 16 == 0 for row in addresses for address in row)
        # Six addresses (`Weight.tensors`), number of weights, first program, whether decayed.
        rows = [
            [*row, w.weight.numel(), first, w.decayed]
            for row, w, first in zip(addresses, weights, self.first_program, strict=False)
        ]
        self.columns = torch.tensor(rows, dtype=torch.int64).to(device)
        self.row = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(num_programs).to(device)
        self.gradient_address = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.gradients_aligned = True
        self._addresses: list[int] = []
        self.betas = torch.tensor(BETAS, device=device)

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradient of each weight: float32, of its shape, contiguous. None does not train it.

        They must stay where they are until the update. The host does not wait for the device. Their addresses are not
        uploaded while a CUDA graph is captured: call `upload_addresses` after the capture.

        Raises:
            TypeError, ValueError: a gradient is not like its weight.
        """
        for w, gradient in zip(self.weights, gradients, strict=True):
            if gradient is not None:
                _check_like("a gradient", gradient, w.weight, torch.float32)
        self.gradients = list(gradients)
        self._addresses = list(map(_address, gradients))
        self.gradients_aligned = all(address % 16 == 0 for address in self._addresses)
        if not (self.columns.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.upload_addresses()

    def upload_addresses(self) -> None:
        """Copy the addresses of the gradients to the device."""
        on_host = torch.tensor(self._addresses, dtype=torch.int64, pin_memory=self.columns.is_cuda)
        self.gradient_address.copy_(on_host, non_blocking=True)

    def clear_gradients(self) -> None:
        """Let go of the gradients, so that their memory can be used again. Set others before the next update."""
        self.gradients = [None] * len(self.weights)


def update_weights(
    table: WeightTable, schedule: Tensor, count: Tensor, scale: Tensor, found_inf: Tensor, part: slice | None = None
) -> None:
    """Update weights, averages, teacher and copies in place. The host does not wait for the device.

    AdamW (arXiv 1711.05101) is that of `torch.optim.AdamW(fused=True)` with betas 0.9 and 0.999 and eps 1e-8, and the
    teacher that of `torch.lerp`. A weight without a gradient is not trained.

    Args:
        table: of the weights, with their gradients.
        schedule: float64 [3]: learning rate, weight decay, and the share of the new weight in the teacher.
        count: float32 [], the number of this update, from 1.
        scale: float32 [], factor of all gradients.
        found_inf: float32 []. If it is 1, nothing changes but the teacher, as if there were no gradients.
        part: rows of the table that are updated; None: all.
    """
    update = launch_update_weights if table.columns.is_cuda else update_weights_cpu
    update(table, schedule, count, scale, found_inf, part)


def update_weights_reference(
    w: Weight, gradient: Tensor | None, schedule: Tensor, count: Tensor, scale: Tensor, found_inf: Tensor
) -> Weight:
    """The definition, for one weight: returns the new values and changes nothing."""
    learning_rate, decay, share = schedule.to(w.weight.dtype)
    weight, average, square_average = w.weight, w.average, w.square_average
    if gradient is not None and average is not None and square_average is not None:
        gradient = gradient * scale
        decayed = weight - learning_rate * decay * weight if w.decayed else weight
        new_average = BETAS[0] * average + (1 - BETAS[0]) * gradient
        new_square_average = BETAS[1] * square_average + (1 - BETAS[1]) * gradient * gradient
        corrected = (new_square_average / (1 - BETAS[1] ** count)).sqrt() + EPS
        new_weight = decayed - learning_rate / (1 - BETAS[0] ** count) * new_average / corrected
        weight = torch.where(found_inf == 1, weight, new_weight)
        average = torch.where(found_inf == 1, average, new_average)
        square_average = torch.where(found_inf == 1, square_average, new_square_average)
    teacher = None if w.teacher is None else w.teacher + share * (weight - w.teacher)
    copy = None if w.copy is None else weight.to(w.copy.dtype)
    teacher_copy = None if w.teacher_copy is None or teacher is None else teacher.to(w.teacher_copy.dtype)
    return Weight(weight, average, square_average, w.decayed, teacher, copy, teacher_copy)


def update_weights_cpu(table, schedule, count, scale, found_inf, part=None):
    """The implementation for CPU tensors: PyTorch's fused AdamW, its moving average and its copies, one by one."""
    rows = list(zip(table.weights, table.gradients, strict=True))[part or slice(None)]
    learning_rate, decay, share = schedule.tolist()
    for decayed in (True, False):
        chosen = [(w, g) for w, g in rows if w.decayed == decayed and g is not None and w.average is not None]
        if chosen and found_inf != 1:
            weights = [w.weight for w, _ in chosen]
            torch._fused_adamw_(
                weights,
                [gradient * scale for _, gradient in chosen],
                [w.average for w, _ in chosen],
                [w.square_average for w, _ in chosen],
                [],
                [count] * len(chosen),
                lr=learning_rate, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay if decayed else 0.0, eps=EPS,
                amsgrad=False, maximize=False,
            )  # fmt: skip
    averaged = [w for w, _ in rows if w.teacher is not None]
    if averaged:
        torch._foreach_lerp_([w.teacher for w in averaged], [w.weight for w in averaged], share)
    pairs = [(copy, new) for w, _ in rows for copy, new in ((w.copy, w.weight), (w.teacher_copy, w.teacher))]
    copied = [(copy, new) for copy, new in pairs if copy is not None]
    if copied:
        torch._foreach_copy_([copy for copy, _ in copied], [new for _, new in copied])


@triton.jit
def _pointer(p_column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table, as a pointer."""
    return tl.multiple_of(tl.load(p_column).to(tl.pointer_type(DTYPE)), 16 if ALIGNED else 1)


@triton.jit
def _update_block(
    p_columns,  # int64 [9], a row of the table
    p_gradient,  # float32, as many as the row has weights
    p_schedule,  # float64 [3]
    p_correction,  # float32 [2]
    p_scale,  # float32 []
    trained,
    start,
    numel,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK weights, the first being number `start`. Arithmetic and rounding are those of PyTorch's kernels."""
    o_weight = start + tl.arange(0, BLOCK)
    m_weight = None if FULL else o_weight < numel
    p_weight = _pointer(p_columns, tl.float32, ALIGNED) + o_weight
    b_weight = tl.load(p_weight, mask=m_weight)
    if trained:
        p_average = _pointer(p_columns + 1, tl.float32, ALIGNED) + o_weight
        p_square = _pointer(p_columns + 2, tl.float32, ALIGNED) + o_weight
        b_average = tl.load(p_average, mask=m_weight)
        b_square = tl.load(p_square, mask=m_weight)
        b_gradient = tl.load(p_gradient + o_weight, mask=m_weight) * tl.load(p_scale)
        rate = tl.load(p_schedule).to(tl.float32)
        decay = tl.load(p_schedule + 1).to(tl.float32) * tl.load(p_columns + 8).to(tl.float32)
        b_weight = tl.fma(-rate * decay, b_weight, b_weight)
        b_average = tl.fma(_BETA1, b_average, tl.fma(-_BETA1, b_gradient, b_gradient))
        b_gradient = b_gradient * b_gradient
        b_square = tl.fma(_BETA2, b_square, tl.fma(-_BETA2, b_gradient, b_gradient))
        size = tl.div_rn(rate, tl.load(p_correction))
        b_root = tl.div_rn(tl.sqrt_rn(b_square), tl.sqrt_rn(tl.load(p_correction + 1)))
        b_weight -= tl.div_rn(size * b_average, b_root + _EPS)
        tl.store(p_weight, b_weight, mask=m_weight)
        tl.store(p_average, b_average, mask=m_weight)
        tl.store(p_square, b_square, mask=m_weight)
    if tl.load(p_columns + 4) != 0:
        p_copy = _pointer(p_columns + 4, COPY_DTYPE, ALIGNED) + o_weight
        tl.store(p_copy, b_weight.to(COPY_DTYPE), mask=m_weight)
    if tl.load(p_columns + 3) != 0:
        p_teacher = _pointer(p_columns + 3, tl.float32, ALIGNED) + o_weight
        b_teacher = tl.load(p_teacher, mask=m_weight)
        share = tl.load(p_schedule + 2).to(tl.float32)
        b_distance = b_weight - b_teacher
        b_near, b_far = tl.fma(share, b_distance, b_teacher), tl.fma(share - 1.0, b_distance, b_weight)
        b_teacher = tl.where(share < 0.5, b_near, b_far)
        tl.store(p_teacher, b_teacher, mask=m_weight)
        if tl.load(p_columns + 5) != 0:
            p_copy = _pointer(p_columns + 5, COPY_DTYPE, ALIGNED) + o_weight
            tl.store(p_copy, b_teacher.to(COPY_DTYPE), mask=m_weight)


@triton.jit(do_not_specialize=["first_program"])
def _update_weights_kernel(
    p_row,  # int32 [programs of all rows], the row that each works on
    p_table,  # int64 [rows, 9]: the columns of `WeightTable`
    p_gradient_address,  # int64 [rows], 0: no gradient
    p_schedule,  # float64 [3]: learning rate, weight decay, share of the new weight in the teacher
    p_correction,  # float32 [2]: 1 - beta ** count
    p_scale,  # float32 []
    p_found_inf,  # float32 []
    first_program,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program updates CHUNK consecutive weights of a row, BLOCK at a time."""
    program = first_program + tl.program_id(0)
    row = tl.load(p_row + program)
    p_columns = p_table + row * 9
    numel = tl.load(p_columns + 6)
    first = (program - tl.load(p_columns + 7)) * CHUNK
    trained = (tl.load(p_gradient_address + row) != 0) & (tl.load(p_columns + 1) != 0) & (tl.load(p_found_inf) != 1)
    p_gradient = _pointer(p_gradient_address + row, tl.float32, ALIGNED)
    for block in range(CHUNK // BLOCK):
        start = first + block * BLOCK
        if start + BLOCK <= numel:
            _update_block(
                p_columns, p_gradient, p_schedule, p_correction, p_scale, trained, start, numel,
                COPY_DTYPE, ALIGNED, True, BLOCK,
            )  # fmt: skip
        elif start < numel:
            _update_block(
                p_columns, p_gradient, p_schedule, p_correction, p_scale, trained, start, numel,
                COPY_DTYPE, ALIGNED, False, BLOCK,
            )  # fmt: skip


def launch_update_weights(table, schedule, count, scale, found_inf, part=None):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    first, end, _ = (part or slice(None)).indices(len(table.weights))
    first_program = table.first_program[first]
    launch(
        _update_weights_kernel,
        table.first_program[end] - first_program,
        table.row,
        table.columns,
        table.gradient_address,
        schedule,
        1 - table.betas**count,
        scale,
        found_inf,
        first_program,
        COPY_DTYPE=_TRITON_DTYPES[table.copy_dtype],
        ALIGNED=table.aligned and table.gradients_aligned,
        BLOCK=_BLOCK,
        CHUNK=_CHUNK,
    )
