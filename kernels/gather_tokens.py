"""gather_tokens: the tokens at given patches, optionally with their position embedding added.

    tokens    [B, N, D]   bf16, fp16, fp32
    index     [B, K]      int32 or int64 in [0, N); one image may name a patch more than once
    position  [N, D]      optional, added at the same patches; the sum is rounded once, to the dtype of tokens
    output    [B, K, D]   output[b, k] = tokens[b, index[b, k]] + position[index[b, k]]

The backward pass sums the rows of a patch that is named several times.
"""

import torch
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


@torch.library.custom_op("dmtjepa::gather_tokens", mutates_args=(), device_types="cpu")
def _gather_tokens(tokens: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    debug_check_index("index", index, tokens.shape[1])
    return gather_tokens_plain(tokens, index, position)


@_gather_tokens.register_fake
def _(tokens: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
    return tokens.new_empty(*index.shape, tokens.shape[2])


@torch.library.custom_op("dmtjepa::scatter_tokens", mutates_args=(), device_types="cpu")
def _scatter_tokens(grad: Tensor, index: Tensor, num_patches: int, dtype: torch.dtype) -> Tensor:
    return scatter_tokens_plain(grad, index, num_patches, dtype)


@_scatter_tokens.register_fake
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
        grad_tokens = _scatter_tokens(grad, index, ctx.num_patches, ctx.token_dtype)
    if ctx.needs_input_grad[2]:
        # Rare (the position embedding of the method is fixed), so it may cost a float32 [B, N, D].
        wide = accumulation_dtype(grad.dtype)
        grad_position = _scatter_tokens(grad, index, ctx.num_patches, wide).sum(0).to(ctx.position_dtype)
    return grad_tokens, None, grad_position


_gather_tokens.register_autograd(_backward, setup_context=_setup_context)


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
    return _gather_tokens(tokens, index, position)
