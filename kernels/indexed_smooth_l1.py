"""indexed_smooth_l1: mean smooth-L1 distance to targets that are read in place through an index.

    prediction  [B, M, T, D]   bf16, fp16, fp32
    target      [U, D]         the unique targets of the batch
    slot        [B, M, T]      int32 or int64 rows of target
    output      scalar         float32: mean over all elements of l(prediction - target[slot])
                               with l(d) = d*d / 2 where |d| < 1, |d| - 1/2 elsewhere

The [B, M, T, D] array of targets is never built. The gradient is clip(d, -1, 1) / (B*M*T*D), in prediction alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    accumulation_dtype,
    check_kernel_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    debug_check_index,
)
from .launch import block_columns, contiguous_rows, launch


def indexed_smooth_l1_reference(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    """The definition, with the targets written out."""
    wide = accumulation_dtype(prediction.dtype)
    distance = (prediction.to(wide) - target.to(wide)[slot.long()]).abs()
    return torch.where(distance < 1, distance * distance / 2, distance - 0.5).mean()


def indexed_smooth_l1_plain(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    """Vectorised PyTorch on any device."""
    wide = accumulation_dtype(prediction.dtype)
    targets = target.index_select(0, slot.flatten()).view(prediction.shape)
    return smooth_l1_loss(prediction.to(wide), targets.to(wide))


@triton.jit(do_not_specialize=["num_rows"])
def _smooth_l1_kernel(
    p_prediction,  # [rows, D], contiguous; rows = B*M*T
    p_target,  # [U, D], strides (s_target, 1)
    p_slot,  # [rows], contiguous
    p_partial,  # float32 [programs]
    num_rows,
    s_target,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_ROWS rows; the sums of the programs are added afterwards, in a fixed order."""
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < num_rows
    b_slot = tl.load(p_slot + o_row, mask=m_row, other=0).to(tl.int64)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_tile = m_row[:, None] & (o_d < D)[None, :]
        p_tile = p_prediction + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_prediction = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        p_tile = p_target + (b_slot * s_target)[:, None] + o_d[None, :]
        b_target = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_distance = tl.abs(b_prediction - b_target)
        b_sum += tl.where(b_distance < 1.0, 0.5 * b_distance * b_distance, b_distance - 0.5)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sum))


@triton.jit(do_not_specialize=["num_rows"])
def _smooth_l1_backward_kernel(
    p_grad,  # float32 []
    p_prediction,  # [rows, D], contiguous
    p_target,  # [U, D], strides (s_target, 1)
    p_slot,  # [rows], contiguous
    p_output,  # [rows, D], contiguous
    num_rows,
    s_target,
    per_element,  # 1 / (B*M*T*D)
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_ROWS rows, BLOCK_D columns of them."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_row = tl.program_id(0) // num_blocks_d * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row = o_row < num_rows
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    b_scale = tl.load(p_grad) * per_element
    b_slot = tl.load(p_slot + o_row, mask=m_row, other=0).to(tl.int64)
    o_tile = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    b_prediction = tl.load(p_prediction + o_tile, mask=m_tile).to(tl.float32)
    b_target = tl.load(p_target + (b_slot * s_target)[:, None] + o_d[None, :], mask=m_tile).to(tl.float32)
    b_distance = b_prediction - b_target
    # Written with comparisons, so that a NaN stays a NaN.
    b_grad = tl.where(b_distance > 1.0, 1.0, tl.where(b_distance < -1.0, -1.0, b_distance)) * b_scale
    tl.store(p_output + o_tile, b_grad.to(p_output.dtype.element_ty), mask=m_tile)


# Rows of 512 bytes, 8 at a time: two 16-byte loads of each input per thread of 128.
_BLOCK_ROWS = 8
_ROW_BYTES = 512


def launch_indexed_smooth_l1(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    debug_check_index("slot", slot, target.shape[0])
    dim = prediction.shape[3]
    prediction, target, slot = prediction.contiguous(), contiguous_rows(target), slot.contiguous()
    num_programs = triton.cdiv(slot.numel(), _BLOCK_ROWS)
    partial = torch.empty(num_programs, dtype=torch.float32, device=prediction.device)
    launch(
        _smooth_l1_kernel,
        num_programs,
        prediction,
        target,
        slot,
        partial,
        slot.numel(),
        target.stride(0),
        D=dim,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=block_columns(dim, prediction.itemsize, _ROW_BYTES),
    )
    return partial.sum() / prediction.numel()


def launch_indexed_smooth_l1_backward(grad: Tensor, prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    dim = prediction.shape[3]
    prediction, target, slot = prediction.contiguous(), contiguous_rows(target), slot.contiguous()
    output = torch.empty_like(prediction)
    block_d = block_columns(dim, prediction.itemsize, _ROW_BYTES)
    launch(
        _smooth_l1_backward_kernel,
        triton.cdiv(slot.numel(), _BLOCK_ROWS) * triton.cdiv(dim, block_d),
        grad,
        prediction,
        target,
        slot,
        output,
        slot.numel(),
        target.stride(0),
        1.0 / max(1, prediction.numel()),
        D=dim,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=block_d,
    )
    return output


# CPU: a block's rows and their targets stay within a core's L2 cache.
_BLOCK_ELEMENTS = 2**16


def _blocks(prediction: Tensor, slot: Tensor):
    """Blocks of rows of prediction [B, M, T, D] as (where, rows [., D], their slots [.])."""
    rows, slots = prediction.reshape(-1, prediction.shape[3]), slot.flatten()
    block = max(1, _BLOCK_ELEMENTS // prediction.shape[3])
    for start in range(0, len(rows), block):
        at = slice(start, start + block)
        yield at, rows[at], slots[at]


def indexed_smooth_l1_cpu(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    debug_check_index("slot", slot, target.shape[0])
    wide = accumulation_dtype(prediction.dtype)
    total = torch.zeros((), dtype=torch.float64)
    for _, rows, slots in _blocks(prediction, slot):
        total += smooth_l1_loss(rows.to(wide), target.index_select(0, slots).to(wide), reduction="sum")
    return (total / prediction.numel()).to(wide)


indexed_smooth_l1_op = torch.library.custom_op(
    "dmtjepa::indexed_smooth_l1", launch_indexed_smooth_l1, mutates_args=(), device_types="cuda"
)
indexed_smooth_l1_op.register_kernel("cpu", indexed_smooth_l1_cpu)


@indexed_smooth_l1_op.register_fake
def _(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    return prediction.new_empty((), dtype=accumulation_dtype(prediction.dtype))


def indexed_smooth_l1_backward_cpu(grad: Tensor, prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    output = torch.empty(prediction.shape, dtype=prediction.dtype)
    output_rows = output.view(-1, prediction.shape[3])
    scale = grad / prediction.numel()
    for at, rows, slots in _blocks(prediction, slot):
        distance = rows.to(scale.dtype) - target.index_select(0, slots)
        output_rows[at] = distance.clamp_(-1, 1).mul_(scale)
    return output


indexed_smooth_l1_backward_op = torch.library.custom_op(
    "dmtjepa::indexed_smooth_l1_backward", launch_indexed_smooth_l1_backward, mutates_args=(), device_types="cuda"
)
indexed_smooth_l1_backward_op.register_kernel("cpu", indexed_smooth_l1_backward_cpu)


@indexed_smooth_l1_backward_op.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return indexed_smooth_l1_backward_op(grad, *ctx.saved_tensors), None, None


indexed_smooth_l1_op.register_autograd(_backward, setup_context=_setup_context)


def check_arguments(prediction: Tensor, target: Tensor, slot: Tensor) -> None:
    check_tensor("prediction", prediction, 4, FLOAT_DTYPES)
    check_tensor("target", target, 2, FLOAT_DTYPES)
    check_tensor("slot", slot, 3, INDEX_DTYPES)
    check_same_device("prediction", prediction, target=target, slot=slot)
    check_shape("slot", slot, prediction.shape[:3], "[B, M, T]")
    check_shape("target", target, (target.shape[0], prediction.shape[3]), "[U, D]")
    if target.requires_grad:
        raise ValueError("target requires a gradient, but targets get none here: detach it")


def indexed_smooth_l1(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    """Mean smooth-L1 distance (beta 1) between predictions and the targets that `slot` points to.

    Args:
        prediction: [B, M, T, D], bf16, fp16 or fp32 (and float64 on the CPU).
        target: [U, D], any float dtype, without gradient.
        slot: [B, M, T], int32 or int64 rows of `target`.

    Returns:
        A scalar in float32 (float64 for float64 predictions), NaN where there is nothing to average. Differentiable
        in `prediction`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a target that requires a gradient. IndexError: in
        debug mode, a slot out of range.
    """
    check_arguments(prediction, target, slot)
    check_kernel_dtype("prediction", prediction)
    return indexed_smooth_l1_op(prediction, target, slot)
