"""indexed_smooth_l1: the mean smooth L1 distance to targets that are read in place through an index.

The [B, M, T, D] array of targets is never built.
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
from .launch import block_columns, contiguous_rows, cpu_blocks, launch
from .registration import define_operator


def indexed_smooth_l1(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    """Mean smooth L1 distance (beta 1) between predictions and the targets that `slot` points to.

    The mean, over all elements, of l(prediction[b, m, t] - target[slot[b, m, t]]) with

        l(d) = d*d / 2 where |d| < 1, |d| - 1/2 elsewhere

    The gradient in `prediction` is clip(d, -1, 1) / (B*M*T*D).

    Args:
        prediction: [B, M, T, D], bfloat16, float16 or float32 (float64 on the CPU).
        target: [U, D], any of these dtypes, without gradient.
        slot: [B, M, T], int32 or int64 in [0, U), indices into `target`.

    Returns:
        A scalar in float32 (float64 for float64 predictions), NaN if there is nothing to average. Differentiable in
        `prediction`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a target that requires a gradient.
        IndexError: in debug mode, a slot out of range.
    """
    check_tensor("prediction", prediction, 4, FLOAT_DTYPES)
    check_tensor("target", target, 2, FLOAT_DTYPES)
    check_tensor("slot", slot, 3, INDEX_DTYPES)
    check_same_device("prediction", prediction, target=target, slot=slot)
    check_shape("slot", slot, prediction.shape[:3], "[B, M, T]")
    check_shape("target", target, (target.shape[0], prediction.shape[3]), "[U, D]")
    if target.requires_grad:
        raise ValueError("target requires a gradient, but targets get none here: detach it")
    check_kernel_dtype("prediction", prediction)
    return indexed_smooth_l1_op(prediction, target, slot)


def indexed_smooth_l1_reference(prediction, target, slot):
    """The definition, with the targets written out."""
    wide = accumulation_dtype(prediction.dtype)
    distance = (prediction.to(wide) - target.to(wide)[slot.long()]).abs()
    return torch.where(distance < 1, distance * distance / 2, distance - 0.5).mean()


def indexed_smooth_l1_plain(prediction: Tensor, target: Tensor, slot: Tensor) -> Tensor:
    """Vectorised PyTorch on any device."""
    wide = accumulation_dtype(prediction.dtype)
    targets = target.index_select(0, slot.flatten()).view(prediction.shape)
    return smooth_l1_loss(prediction.to(wide), targets.to(wide))


@triton.jit(do_not_specialize=["num_tokens"])
def _smooth_l1_kernel(
    p_prediction,  # [B*M*T, D], contiguous
    p_target,  # [U, D], strides (s_target, 1)
    p_slot,  # [B*M*T], contiguous
    p_partial,  # float32 [programs], contiguous
    num_tokens,  # B*M*T
    s_target,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_TOKENS predictions; the sums are added up afterwards, in a fixed order."""
    o_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    m_token = o_token < num_tokens
    b_slot = tl.load(p_slot + o_token, mask=m_token, other=0).to(tl.int64)
    b_sum = tl.zeros([BLOCK_TOKENS, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_block = m_token[:, None] & (o_d < D)[None, :]
        p_block = p_prediction + o_token.to(tl.int64)[:, None] * D + o_d[None, :]
        b_prediction = tl.load(p_block, mask=m_block, other=0.0).to(tl.float32)
        p_block = p_target + (b_slot * s_target)[:, None] + o_d[None, :]
        b_target = tl.load(p_block, mask=m_block, other=0.0).to(tl.float32)
        b_distance = tl.abs(b_prediction - b_target)
        b_sum += tl.where(b_distance < 1.0, 0.5 * b_distance * b_distance, b_distance - 0.5)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sum))


@triton.jit(do_not_specialize=["num_tokens"])
def _smooth_l1_backward_kernel(
    p_grad,  # float32 []
    p_prediction,  # [B*M*T, D], contiguous
    p_target,  # [U, D], strides (s_target, 1)
    p_slot,  # [B*M*T], contiguous
    p_output,  # [B*M*T, D], contiguous
    num_tokens,  # B*M*T
    s_target,
    per_element,  # 1 / (B*M*T*D)
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_D columns of the gradients of BLOCK_TOKENS predictions."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_token = tl.program_id(0) // num_blocks_d * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_token = o_token < num_tokens
    m_block = m_token[:, None] & (o_d < D)[None, :]
    b_scale = tl.load(p_grad) * per_element
    b_slot = tl.load(p_slot + o_token, mask=m_token, other=0).to(tl.int64)
    o_block = o_token.to(tl.int64)[:, None] * D + o_d[None, :]
    b_prediction = tl.load(p_prediction + o_block, mask=m_block).to(tl.float32)
    b_target = tl.load(p_target + (b_slot * s_target)[:, None] + o_d[None, :], mask=m_block).to(tl.float32)
    b_distance = b_prediction - b_target
    # Written with comparisons, so that a NaN stays a NaN.
    b_grad = tl.where(b_distance > 1.0, 1.0, tl.where(b_distance < -1.0, -1.0, b_distance)) * b_scale
    tl.store(p_output + o_block, b_grad.to(p_output.dtype.element_ty), mask=m_block)


# 8 tokens of 512 bytes: two 16-byte loads of each input per thread of 128.
_BLOCK_TOKENS = 8
_BLOCK_BYTES = 512


def launch_indexed_smooth_l1(prediction, target, slot):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    debug_check_index("slot", slot, target.shape[0])
    dim = prediction.shape[3]
    prediction, target, slot = prediction.contiguous(), contiguous_rows(target), slot.contiguous()
    num_programs = triton.cdiv(slot.numel(), _BLOCK_TOKENS)
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
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_D=block_columns(dim, prediction.itemsize, _BLOCK_BYTES),
    )
    return partial.sum() / prediction.numel()


def launch_indexed_smooth_l1_backward(grad, prediction, target, slot):
    """The backward pass for CUDA tensors: starts the Triton kernel."""
    dim = prediction.shape[3]
    prediction, target, slot = prediction.contiguous(), contiguous_rows(target), slot.contiguous()
    output = torch.empty_like(prediction)
    block_d = block_columns(dim, prediction.itemsize, _BLOCK_BYTES)
    launch(
        _smooth_l1_backward_kernel,
        triton.cdiv(slot.numel(), _BLOCK_TOKENS) * triton.cdiv(dim, block_d),
        grad,
        prediction,
        target,
        slot,
        output,
        slot.numel(),
        target.stride(0),
        1.0 / max(1, prediction.numel()),
        D=dim,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_D=block_d,
    )
    return output


def indexed_smooth_l1_cpu(prediction, target, slot):
    """The implementation for CPU tensors: plain PyTorch, a block of predictions at a time."""
    debug_check_index("slot", slot, target.shape[0])
    wide = accumulation_dtype(prediction.dtype)
    tokens, slots = prediction.reshape(-1, prediction.shape[3]), slot.flatten()
    total = torch.zeros((), dtype=torch.float64)
    for block in cpu_blocks(*tokens.shape):
        targets = target.index_select(0, slots[block]).to(wide)
        total += smooth_l1_loss(tokens[block].to(wide), targets, reduction="sum")
    return (total / prediction.numel()).to(wide)


def indexed_smooth_l1_backward_cpu(grad, prediction, target, slot):
    """The backward pass for CPU tensors, a block of predictions at a time."""
    tokens, slots = prediction.reshape(-1, prediction.shape[3]), slot.flatten()
    output = torch.empty(tokens.shape, dtype=prediction.dtype)
    scale = grad / prediction.numel()
    for block in cpu_blocks(*tokens.shape):
        distance = tokens[block].to(scale.dtype) - target.index_select(0, slots[block])
        output[block] = distance.clamp_(-1, 1).mul_(scale)
    return output.view(prediction.shape)


indexed_smooth_l1_op = define_operator(
    "indexed_smooth_l1(Tensor prediction, Tensor target, Tensor slot) -> Tensor",
    cuda=launch_indexed_smooth_l1,
    cpu=indexed_smooth_l1_cpu,
    fake=lambda prediction, target, slot: prediction.new_empty((), dtype=accumulation_dtype(prediction.dtype)),
)
indexed_smooth_l1_backward_op = define_operator(
    "indexed_smooth_l1_backward(Tensor grad, Tensor prediction, Tensor target, Tensor slot) -> Tensor",
    cuda=launch_indexed_smooth_l1_backward,
    cpu=indexed_smooth_l1_backward_cpu,
    fake=lambda grad, prediction, target, slot: prediction.new_empty(prediction.shape),
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return indexed_smooth_l1_backward_op(grad, *ctx.saved_tensors), None, None


indexed_smooth_l1_op.register_autograd(_backward, setup_context=_setup_context)
