"""gather_tokens: the tokens of each image at given patches.

The backward pass sums the gradients of a patch that is named several times. One kernel links the tokens that name one
patch into a list, by an integer exchange per token. Then every program adds up the lists of its own patches, so that
each gradient is written once, zeros included, without atomic additions. The result is the same in every run unless a
patch is named three times or more, where the order of the float32 sum may differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    accumulation_dtype,
    check_kernel_dtype,
    check_same_device,
    check_tensor,
    debug_check_index,
)
from .launch import block_columns, contiguous_rows, launch
from .registration import define_operator


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at the patches `index` of each image: output[b, c] = tokens[b, index[b, c]].

    Args:
        tokens: [B, N, D], bfloat16, float16 or float32 (float64 on the CPU); any strides.
        index: [B, C], int32 or int64 in [0, N); an image may name a patch more than once.

    Returns:
        [B, C, D] in the dtype of `tokens`. Differentiable in `tokens`; gradients are summed in float32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        IndexError: in debug mode, an index out of range.
    """
    check_tensor("tokens", tokens, 3, FLOAT_DTYPES)
    check_tensor("index", index, 2, INDEX_DTYPES)
    check_same_device("tokens", tokens, index=index)
    if index.shape[0] != tokens.shape[0]:
        raise ValueError(f"index has {index.shape[0]} rows but tokens has {tokens.shape[0]} images")
    check_kernel_dtype("tokens", tokens)
    return gather_tokens_op(tokens, index)


def gather_tokens_reference(tokens, index):
    """The definition, one patch at a time."""
    output = tokens.new_empty(*index.shape, tokens.shape[2])
    for b, patches in enumerate(index.tolist()):
        for c, n in enumerate(patches):
            output[b, c] = tokens[b, n]
    return output


def gather_tokens_plain(tokens: Tensor, index: Tensor) -> Tensor:
    """Vectorised PyTorch on any device."""
    num_images, num_patches, dim = tokens.shape
    flat_index = _flatten_index(index, num_patches)
    return tokens.reshape(num_images * num_patches, dim).index_select(0, flat_index).view(*index.shape, dim)


def scatter_tokens_plain(grad, index, num_patches):
    """The backward pass: [B, C, D] gradients summed into [B, N, D] at `index` [B, C], in float32 or wider."""
    num_images, _, dim = grad.shape
    wide = accumulation_dtype(grad.dtype)
    total = torch.zeros(num_images * num_patches, dim, dtype=wide, device=grad.device)
    total.index_add_(0, _flatten_index(index, num_patches), grad.reshape(-1, dim).to(wide))
    return total.to(grad.dtype).view(num_images, num_patches, dim)


def _flatten_index(index: Tensor, num_patches: int) -> Tensor:
    """Patches [B, C] of each image as patches [B*C] of the batch, b*N + n."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * num_patches
    return (index + first).flatten()


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "s_index_image"])
def _gather_tokens_kernel(
    p_tokens,  # [B, N, D], strides (s_tokens_image, s_tokens_patch, 1)
    p_index,  # [B, C], strides (s_index_image, 1)
    p_output,  # [B, C, D], contiguous
    num_tokens,  # B*C
    num_kept,  # C
    s_tokens_image,
    s_tokens_patch,
    s_index_image,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program copies BLOCK_D columns of BLOCK_TOKENS tokens; adjacent programs copy the columns of one token."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_token = tl.program_id(0) // num_blocks_d * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_token = o_token < num_tokens
    m_block = m_token[:, None] & (o_d < D)[None, :]

    b_image = (o_token // num_kept).to(tl.int64)
    b_patch = tl.load(p_index + b_image * s_index_image + o_token % num_kept, mask=m_token, other=0).to(tl.int64)
    o_source = b_image * s_tokens_image + b_patch * s_tokens_patch
    b_token = tl.load(p_tokens + o_source[:, None] + o_d[None, :], mask=m_block)
    tl.store(p_output + o_token.to(tl.int64)[:, None] * D + o_d[None, :], b_token, mask=m_block)


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "s_index_image"])
def _link_tokens_kernel(
    p_index,  # [B, C], strides (s_index_image, 1)
    p_first,  # int32 [B, N], contiguous, -1 on entry: becomes a c that names the patch
    p_next,  # int32 [B, C], contiguous: becomes another c that names the same patch, or -1
    num_tokens,  # B*C
    num_kept,  # C
    num_patches,  # N
    s_index_image,
    BLOCK_TOKENS: tl.constexpr,
):
    """Links the tokens of each patch into a list."""
    o_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    m_token = o_token < num_tokens
    b_image = (o_token // num_kept).to(tl.int64)
    b_patch = tl.load(p_index + b_image * s_index_image + o_token % num_kept, mask=m_token, other=0).to(tl.int64)
    b_next = tl.atomic_xchg(p_first + b_image * num_patches + b_patch, o_token % num_kept, mask=m_token)
    tl.store(p_next + o_token, b_next, mask=m_token)


@triton.jit(do_not_specialize=["num_tokens", "num_kept"])
def _scatter_tokens_kernel(
    p_grad,  # [B, C, D], strides (s_grad_image, s_grad_patch, 1)
    p_first,  # int32 [B, N], contiguous
    p_next,  # int32 [B, C], contiguous
    p_output,  # [B, N, D], contiguous
    num_tokens,  # B*N
    num_kept,  # C
    num_patches,  # N
    s_grad_image,
    s_grad_patch,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program adds up BLOCK_D columns of the lists of BLOCK_TOKENS patches."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_token = tl.program_id(0) // num_blocks_d * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_token = o_token < num_tokens
    m_d = o_d < D

    b_image = (o_token // num_patches).to(tl.int64)
    b_kept = tl.load(p_first + o_token, mask=m_token, other=-1)
    b_sum = tl.zeros([BLOCK_TOKENS, BLOCK_D], dtype=tl.float32)
    while tl.max(b_kept) >= 0:
        m_kept = b_kept >= 0
        o_grad = b_image * s_grad_image + b_kept.to(tl.int64) * s_grad_patch
        b_grad = tl.load(p_grad + o_grad[:, None] + o_d[None, :], mask=m_kept[:, None] & m_d[None, :], other=0.0)
        b_sum += b_grad.to(tl.float32)
        b_kept = tl.load(p_next + b_image * num_kept + b_kept, mask=m_kept, other=-1)
    p_block = p_output + o_token.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_block, b_sum.to(p_output.dtype.element_ty), mask=m_token[:, None] & m_d[None, :])


# 32 tokens of 256 bytes give each of 128 threads four independent 16-byte loads.
_BLOCK_TOKENS = 32
_BLOCK_BYTES = 256


def launch_gather_tokens(tokens, index):
    """The implementation for CUDA tensors: starts the Triton kernel."""
    num_images, num_patches, dim = tokens.shape
    num_kept = index.shape[1]
    debug_check_index("index", index, num_patches)
    tokens, index = contiguous_rows(tokens), contiguous_rows(index)
    output = tokens.new_empty(num_images, num_kept, dim)
    block_d = block_columns(dim, tokens.itemsize, _BLOCK_BYTES)
    launch(
        _gather_tokens_kernel,
        triton.cdiv(num_images * num_kept, _BLOCK_TOKENS) * triton.cdiv(dim, block_d),
        tokens,
        index,
        output,
        num_images * num_kept,
        num_kept,
        tokens.stride(0),
        tokens.stride(1),
        index.stride(0),
        D=dim,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_D=block_d,
    )
    return output


def launch_scatter_tokens(grad, index, num_patches):
    """The backward pass for CUDA tensors: starts the two Triton kernels."""
    num_images, num_kept, dim = grad.shape
    grad, index = contiguous_rows(grad), contiguous_rows(index)
    first = torch.full((num_images, num_patches), -1, dtype=torch.int32, device=grad.device)
    following = torch.empty((num_images, num_kept), dtype=torch.int32, device=grad.device)
    launch(
        _link_tokens_kernel,
        triton.cdiv(num_images * num_kept, 256),
        index,
        first,
        following,
        num_images * num_kept,
        num_kept,
        num_patches,
        index.stride(0),
        BLOCK_TOKENS=256,
    )
    output = grad.new_empty(num_images, num_patches, dim)
    block_d = block_columns(dim, grad.itemsize, _BLOCK_BYTES)
    launch(
        _scatter_tokens_kernel,
        triton.cdiv(num_images * num_patches, _BLOCK_TOKENS) * triton.cdiv(dim, block_d),
        grad,
        first,
        following,
        output,
        num_images * num_patches,
        num_kept,
        num_patches,
        grad.stride(0),
        grad.stride(1),
        D=dim,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_D=block_d,
    )
    return output


def gather_tokens_cpu(tokens, index):
    """The implementation for CPU tensors."""
    debug_check_index("index", index, tokens.shape[1])
    return gather_tokens_plain(tokens, index)


gather_tokens_op = define_operator(
    "gather_tokens(Tensor tokens, Tensor index) -> Tensor",
    cuda=launch_gather_tokens,
    cpu=gather_tokens_cpu,
    fake=lambda tokens, index: tokens.new_empty(*index.shape, tokens.shape[2]),
)
scatter_tokens_op = define_operator(
    "scatter_tokens(Tensor grad, Tensor index, SymInt num_patches) -> Tensor",
    cuda=launch_scatter_tokens,
    cpu=scatter_tokens_plain,
    fake=lambda grad, index, num_patches: grad.new_empty(grad.shape[0], num_patches, grad.shape[2]),
)


def _setup_context(ctx, inputs, output) -> None:
    tokens, index = inputs
    ctx.save_for_backward(index)
    ctx.num_patches = tokens.shape[1]


def _backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return scatter_tokens_op(grad, index, ctx.num_patches), None


gather_tokens_op.register_autograd(_backward, setup_context=_setup_context)
