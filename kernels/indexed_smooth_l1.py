"""indexed_smooth_l1: mean smooth-L1 distance to targets that are read in place through an index.

    prediction  [B, M, T, D]   bf16, fp16, fp32
    target      [U, D]         the unique targets of the batch
    slot        [B, M, T]      int32 or int64 rows of target
    output      scalar         float32: mean over all elements of l(prediction - target[slot])
                               with l(d) = d*d / 2 where |d| < 1, |d| - 1/2 elsewhere

The [B, M, T, D] array of targets is never built. The gradient is clip(d, -1, 1) / (B*M*T*D), in prediction alone.
"""

import torch
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


# CPU: a block's rows and their targets stay within a core's L2 cache.
_BLOCK_ELEMENTS = 2**16


def _blocks(prediction: Tensor, slot: Tensor):
    """Blocks of rows of prediction [B, M, T, D] as (where, rows [., D], their slots [.])."""
    rows, slots = prediction.reshape(-1, prediction.shape[3]), slot.flatten()
    block = max(1, _BLOCK_ELEMENTS // prediction.shape[3])
    for start in range(0, len(rows), block):
        at = slice(start, start + block)
        yield at, rows[at], slots[at]


@torch.library.custom_op("dmtjepa::indexed_smooth_l1", mutates_args=(), device_types="cpu")
def _indexed_smooth_l1(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    debug_check_index("slot", slot, target.shape[0])
    wide = accumulation_dtype(prediction.dtype)
    total = torch.zeros((), dtype=torch.float64)
    for _, rows, slots in _blocks(prediction, slot):
        total += smooth_l1_loss(rows.to(wide), target.index_select(0, slots).to(wide), reduction="sum")
    return (total / prediction.numel()).to(wide)


@_indexed_smooth_l1.register_fake
def _(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    return prediction.new_empty((), dtype=accumulation_dtype(prediction.dtype))


@torch.library.custom_op("dmtjepa::indexed_smooth_l1_backward", mutates_args=(), device_types="cpu")
def _indexed_smooth_l1_backward(grad: Tensor, prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    output = torch.empty(prediction.shape, dtype=prediction.dtype)
    output_rows = output.view(-1, prediction.shape[3])
    scale = grad / prediction.numel()
    for at, rows, slots in _blocks(prediction, slot):
        distance = rows.to(scale.dtype) - target.index_select(0, slots)
        output_rows[at] = distance.clamp_(-1, 1).mul_(scale)
    return output


@_indexed_smooth_l1_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return _indexed_smooth_l1_backward(grad, *ctx.saved_tensors), None, None


_indexed_smooth_l1.register_autograd(_backward, setup_context=_setup_context)


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
    return _indexed_smooth_l1(prediction, target, slot)
