"""gather_tokens: the tokens at given patches, optionally with their position embedding added.

    tokens    [B, N, D]   bf16, fp16, fp32
    index     [B, K]      int32 or int64 in [0, N); one image may name a patch more than once
    position  [N, D]      optional, added at the same patches; the sum is rounded once, to the dtype of tokens
    output    [B, K, D]   output[b, k] = tokens[b, index[b, k]] + position[index[b, k]]

The backward pass sums the rows of a patch that is named several times. It links the rows that name one patch into a
list, by an integer exchange per row, and then every program adds up the lists of its own patches: each gradient is
written once, zeros included, without atomic additions. The result is the same in every run unless a patch is named
three times or more, where the order of the float32 sum may differ.
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
    check_shape,
    check_tensor,
    debug_check_index,
)
from .launch import block_columns, contiguous_rows, launch


def gather_tokens_reference(tokens: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
    """The definition, one patch at a time."""
    images = []
    for image, image_index in zip(tokens, index, strict=True):
        rows = [image[n].to(accumulation_dtype(tokens.dtype)) for n in image_index.tolist()]
        if position is not None:
            rows = [row + position[n].to(row.dtype) for row, n in zip(rows, image_index.tolist(), strict=True)]
        images.append(torch.stack(rows).to(tokens.dtype) if rows else image.new_empty(0, image.shape[1]))
    return torch.stack(images)


def gather_tokens_plain(tokens: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
    """Vectorised PyTorch on any device."""
    num_images, num_patches, dim = tokens.shape
    first = torch.arange(num_images, device=tokens.device)[:, None] * num_patches
    rows = tokens.reshape(-1, dim).index_select(0, (index + first).flatten())
    if position is not None:
        wide = accumulation_dtype(tokens.dtype)
        rows = (rows.to(wide) + position.index_select(0, index.flatten()).to(wide)).to(tokens.dtype)
    return rows.view(*index.shape, dim)


def scatter_tokens_plain(grad: Tensor, index: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    """The adjoint of the gather: [B, K, D] rows summed into [B, N, D] at `index`, in float32 or wider."""
    num_images, _, dim = grad.shape
    first = torch.arange(num_images, device=grad.device)[:, None] * num_patches
    wide = accumulation_dtype(grad.dtype)
    total = torch.zeros(num_images * num_patches, dim, dtype=wide, device=grad.device)
    total.index_add_(0, (index + first).flatten(), grad.reshape(-1, dim).to(wide))
    return total.to(dtype).view(num_images, num_patches, dim)


@triton.jit(do_not_specialize=["num_rows", "num_kept", "s_index_image"])
def _gather_tokens_kernel(
    p_tokens,  # [B, N, D], strides (s_tokens_image, s_tokens_patch, 1)
    p_index,  # [B, K], strides (s_index_image, 1)
    p_position,  # [N, D], strides (s_position_patch, 1); unused without HAS_POSITION
    p_output,  # [B, K, D], contiguous
    num_rows,  # B*K
    num_kept,  # K
    s_tokens_image,
    s_tokens_patch,
    s_index_image,
    s_position_patch,
    D: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program copies BLOCK_ROWS rows, BLOCK_D columns of them; the columns of a row go to adjacent programs."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_row = tl.program_id(0) // num_blocks_d * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row = o_row < num_rows
    m_tile = m_row[:, None] & (o_d < D)[None, :]

    b_image = (o_row // num_kept).to(tl.int64)
    b_patch = tl.load(p_index + b_image * s_index_image + o_row % num_kept, mask=m_row, other=0).to(tl.int64)
    o_token = b_image * s_tokens_image + b_patch * s_tokens_patch
    b_tile = tl.load(p_tokens + o_token[:, None] + o_d[None, :], mask=m_tile)
    if HAS_POSITION:
        p_tile = p_position + (b_patch * s_position_patch)[:, None] + o_d[None, :]
        b_position = tl.load(p_tile, mask=m_tile)
        b_tile = (b_tile.to(tl.float32) + b_position.to(tl.float32)).to(p_output.dtype.element_ty)
    tl.store(p_output + o_row.to(tl.int64)[:, None] * D + o_d[None, :], b_tile, mask=m_tile)


@triton.jit(do_not_specialize=["num_rows", "num_kept", "s_index_image"])
def _link_rows_kernel(
    p_index,  # [B, K], strides (s_index_image, 1)
    p_first,  # [B, N] int32, -1 on entry: becomes one of the rows that name the patch
    p_next,  # [B, K] int32: becomes another row that names the same patch, or -1
    num_rows,  # B*K
    num_kept,  # K
    num_patches,  # N
    s_index_image,
    BLOCK_ROWS: tl.constexpr,
):
    """Links the rows of each patch into a list."""
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < num_rows
    b_image = (o_row // num_kept).to(tl.int64)
    b_patch = tl.load(p_index + b_image * s_index_image + o_row % num_kept, mask=m_row, other=0).to(tl.int64)
    b_next = tl.atomic_xchg(p_first + b_image * num_patches + b_patch, o_row % num_kept, mask=m_row)
    tl.store(p_next + o_row, b_next, mask=m_row)


@triton.jit(do_not_specialize=["num_rows", "num_kept"])
def _scatter_tokens_kernel(
    p_grad,  # [B, K, D], strides (s_grad_image, s_grad_row, 1)
    p_first,  # [B, N] int32
    p_next,  # [B, K] int32
    p_output,  # [B, N, D], contiguous
    num_rows,  # B*N
    num_kept,  # K
    num_patches,  # N
    s_grad_image,
    s_grad_row,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program adds up the lists of BLOCK_ROWS patches, BLOCK_D columns of them."""
    num_blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_row = tl.program_id(0) // num_blocks_d * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.program_id(0) % num_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row = o_row < num_rows
    m_d = o_d < D

    b_image = (o_row // num_patches).to(tl.int64)
    b_kept = tl.load(p_first + o_row, mask=m_row, other=-1)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_D], dtype=tl.float32)
    while tl.max(b_kept) >= 0:
        m_kept = b_kept >= 0
        o_grad = b_image * s_grad_image + b_kept.to(tl.int64) * s_grad_row
        b_grad = tl.load(p_grad + o_grad[:, None] + o_d[None, :], mask=m_kept[:, None] & m_d[None, :], other=0.0)
        b_sum += b_grad.to(tl.float32)
        b_kept = tl.load(p_next + b_image * num_kept + b_kept, mask=m_kept, other=-1)
    p_tile = p_output + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_tile, b_sum.to(p_output.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


# A tile of 32 rows of 256 bytes gives each of 128 threads four independent 16-byte loads.
_BLOCK_ROWS = 32
_ROW_BYTES = 256


def launch_gather_tokens(tokens: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    num_images, num_patches, dim = tokens.shape
    num_kept = index.shape[1]
    debug_check_index("index", index, num_patches)
    tokens, index = contiguous_rows(tokens), contiguous_rows(index)
    table = tokens if position is None else contiguous_rows(position)
    output = tokens.new_empty(num_images, num_kept, dim)
    block_d = block_columns(dim, tokens.itemsize, _ROW_BYTES)
    launch(
        _gather_tokens_kernel,
        triton.cdiv(num_images * num_kept, _BLOCK_ROWS) * triton.cdiv(dim, block_d),
        tokens,
        index,
        table,
        output,
        num_images * num_kept,
        num_kept,
        tokens.stride(0),
        tokens.stride(1),
        index.stride(0),
        table.stride(-2),
        D=dim,
        HAS_POSITION=position is not None,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=block_d,
    )
    return output


def launch_scatter_tokens(grad: Tensor, index: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    num_images, num_kept, dim = grad.shape
    grad, index = contiguous_rows(grad), contiguous_rows(index)
    first = torch.full((num_images, num_patches), -1, dtype=torch.int32, device=grad.device)
    following = torch.empty((num_images, num_kept), dtype=torch.int32, device=grad.device)
    launch(
        _link_rows_kernel,
        triton.cdiv(num_images * num_kept, 256),
        index,
        first,
        following,
        num_images * num_kept,
        num_kept,
        num_patches,
        index.stride(0),
        BLOCK_ROWS=256,
    )
    output = grad.new_empty(num_images, num_patches, dim, dtype=dtype)
    block_d = block_columns(dim, grad.itemsize, _ROW_BYTES)
    launch(
        _scatter_tokens_kernel,
        triton.cdiv(num_images * num_patches, _BLOCK_ROWS) * triton.cdiv(dim, block_d),
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
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=block_d,
    )
    return output


def gather_tokens_cpu(tokens: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    debug_check_index("index", index, tokens.shape[1])
    return gather_tokens_plain(tokens, index, position)


gather_tokens_op = torch.library.custom_op(
    "dmtjepa::gather_tokens", launch_gather_tokens, mutates_args=(), device_types="cuda"
)
gather_tokens_op.register_kernel("cpu", gather_tokens_cpu)


@gather_tokens_op.register_fake
def _(tokens: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    return tokens.new_empty(*index.shape, tokens.shape[2])


scatter_tokens_op = torch.library.custom_op(
    "dmtjepa::scatter_tokens", launch_scatter_tokens, mutates_args=(), device_types="cuda"
)
scatter_tokens_op.register_kernel("cpu", scatter_tokens_plain)


@scatter_tokens_op.register_fake
def _(grad: Tensor, index: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[0], num_patches, grad.shape[2], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    tokens, index, position = inputs
    ctx.save_for_backward(index)
    ctx.num_patches = tokens.shape[1]
    ctx.token_dtype = tokens.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    grad_tokens = grad_position = None
    if ctx.needs_input_grad[0]:
        grad_tokens = scatter_tokens_op(grad, index, ctx.num_patches, ctx.token_dtype)
    if ctx.needs_input_grad[2]:
        # Rare (the position embedding of the method is fixed), so it may cost a float32 [B, N, D].
        wide = accumulation_dtype(grad.dtype)
        grad_position = scatter_tokens_op(grad, index, ctx.num_patches, wide).sum(0).to(ctx.position_dtype)
    return grad_tokens, None, grad_position


gather_tokens_op.register_autograd(_backward, setup_context=_setup_context)


def check_arguments(tokens: Tensor, index: Tensor, position: Tensor | None) -> None:
    check_tensor("tokens", tokens, 3, FLOAT_DTYPES)
    check_tensor("index", index, 2, INDEX_DTYPES)
    check_same_device("tokens", tokens, index=index)
    if index.shape[0] != tokens.shape[0]:
        raise ValueError(f"index has {index.shape[0]} rows but tokens has {tokens.shape[0]} images")
    if position is not None:
        check_tensor("position", position, 2, FLOAT_DTYPES)
        check_shape("position", position, tokens.shape[1:], "[N, D]")
        check_same_device("tokens", tokens, position=position)


def gather_tokens(tokens: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
    """Tokens at the patches `index` of each image, plus the position embedding of those patches if given.

    Args:
        tokens: [B, N, D], bf16, fp16 or fp32 (and float64 on the CPU); any strides.
        index: [B, K], int32 or int64 in [0, N).
        position: [N, D], any float dtype; added in float32 and rounded once.

    Returns:
        [B, K, D] in the dtype of `tokens`. Differentiable in `tokens` and `position`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: in debug mode, an index out of range.
    """
    check_arguments(tokens, index, position)
    check_kernel_dtype("tokens", tokens)
    return gather_tokens_op(tokens, index, position)
