"""embed_patches: uint8 images to normalised, flattened patches, at the kept patches only.

The patch embedding is then one matrix product, `patches @ conv.weight.flatten(1).T + conv.bias`. Neither a float image
nor the embedding of a dropped patch ever exists.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOAT_DTYPES, INDEX_DTYPES, accumulation_dtype, check_same_device, check_tensor, debug_check_index
from .launch import contiguous_rows, launch
from .registration import define_operator


def embed_patches(
    images: Tensor,
    patch_size: int,
    index: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The normalised pixels of the patches `index` of each image, ready for the patch embedding's matrix product.

    With p = patch_size and (r, s) = divmod(index[b, k], W / p):

        output[b, k, c, i, j] = (images[b, c, p*r + i, p*s + j] / 255 - mean[c]) / std[c]

    Args:
        images: [B, C, H, W] uint8, H and W multiples of `patch_size`; any strides, so that a permuted [B, H, W, C] is
            read in place. C is 3 in the Triton kernel; other images take plain PyTorch.
        patch_size: side p of a patch in pixels.
        index: [B, K], int32 or int64 in [0, N) with N = (H / p) * (W / p); None takes all patches in raster order.
        mean: a number for each channel, of pixels scaled to [0, 1].
        std: likewise.
        dtype: of the result: bfloat16, float16 or float32 (float64 on the CPU). The arithmetic is float32 or wider.

    Returns:
        [B, K or N, C*p*p] with columns in (channel, row, column) order, the order of `conv.weight.flatten(1)`. Not
        differentiable, as the pixels are bytes.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
        IndexError: in debug mode, an index out of range.
    """
    check_tensor("images", images, 4, (torch.uint8,))
    check_same_device("images", images)
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(f"mean and std must be a number for each channel, std positive, got {mean} and {std}")
    if images.shape[1] != len(mean):
        raise ValueError(
            f"images must be [B, {len(mean)}, H, W], got {list(images.shape)}: permute images with channels last"
        )
    height, width = images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels does not divide into patches of {patch_size}")
    if dtype not in FLOAT_DTYPES or (dtype == torch.float64 and images.device.type == "cuda"):
        raise TypeError(f"dtype must be bfloat16, float16 or float32 (float64 on the CPU alone), got {dtype}")
    if index is not None:
        check_tensor("index", index, 2, INDEX_DTYPES)
        check_same_device("images", images, index=index)
        if index.shape[0] != images.shape[0]:
            raise ValueError(f"index has {index.shape[0]} rows but there are {images.shape[0]} images")
    return embed_patches_op(images, patch_size, index, list(mean), list(std), dtype)


def embed_patches_reference(images, patch_size, index=None, *, mean, std, dtype=torch.float32):
    """The definition, one patch at a time."""
    num_images, channels, height, width = images.shape
    cols = width // patch_size
    if index is None:
        index = torch.arange(height // patch_size * cols).expand(num_images, -1)
    mean, std = (torch.tensor(values, dtype=accumulation_dtype(dtype)).view(-1, 1, 1) for values in (mean, std))
    output = torch.empty(*index.shape, channels * patch_size * patch_size, dtype=dtype)
    for b, patches in enumerate(index.tolist()):
        for c, n in enumerate(patches):
            top, left = n // cols * patch_size, n % cols * patch_size
            patch = images[b, :, top : top + patch_size, left : left + patch_size].cpu().to(mean.dtype)
            output[b, c] = ((patch / 255 - mean) / std).flatten()
    return output.to(images.device)


def embed_patches_plain(
    images: Tensor,
    patch_size: int,
    index: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Vectorised PyTorch on any device: the bytes are gathered first, so only kept patches become floats."""
    num_images, num_channels, height, width = images.shape
    rows, cols = height // patch_size, width // patch_size
    # [B, C, rows, p, cols, p] -> [B, rows, cols, C, p, p], a view
    patches = images.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size)).permute(0, 2, 4, 1, 3, 5)
    if index is None:
        patches = patches.reshape(num_images, rows * cols, num_channels, patch_size * patch_size)
    else:
        image = torch.arange(num_images, device=images.device)[:, None]
        patches = patches[image, index // cols, index % cols].flatten(3)
    channels = patches.to(accumulation_dtype(dtype)).unbind(2)
    # Numbers, not a tensor of them: the host would wait for the device to copy it.
    each = zip(channels, *scale_and_shift(mean, std), strict=True)
    return torch.cat([(channel * scale + shift).to(dtype) for channel, scale, shift in each], dim=2)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(x / 255 - mean) / std written as x * scale + shift, per channel."""
    scale = [1.0 / (255.0 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return scale, shift


@triton.jit
def _embed_patches_kernel(
    p_images,  # uint8 [B, 3, H, W], strides (s_image, s_channel, s_row, s_column)
    p_index,  # [B, C], strides (s_index_image, 1); unused without HAS_INDEX
    p_output,  # [B, C, 3*P*P], contiguous
    num_patches,  # B*C
    num_kept,  # C
    grid_cols,  # W / P
    s_image,
    s_channel,
    s_row,
    s_column,
    s_index_image,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    P: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One program normalises BLOCK_PATCHES patches, a channel (or BLOCK_PIXELS pixels of it) at a time."""
    o_patch = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    m_patch = o_patch < num_patches
    b_image = (o_patch // num_kept).to(tl.int64)
    b_patch = o_patch % num_kept
    if HAS_INDEX:
        b_patch = tl.load(p_index + b_image * s_index_image + b_patch, mask=m_patch, other=0).to(tl.int32)
    o_top = (b_patch // grid_cols * P).to(tl.int64) * s_row
    o_left = (b_patch % grid_cols * P).to(tl.int64) * s_column
    o_corner = b_image * s_image + o_top + o_left

    for c in tl.static_range(3):
        scale = scale_r if c == 0 else (scale_g if c == 1 else scale_b)
        shift = shift_r if c == 0 else (shift_g if c == 1 else shift_b)
        for start in tl.static_range(0, P * P, BLOCK_PIXELS):
            o_pixel = start + tl.arange(0, BLOCK_PIXELS)
            m_block = m_patch[:, None] & (o_pixel < P * P)[None, :]
            o_block = o_corner[:, None] + (c * s_channel + o_pixel // P * s_row + o_pixel % P * s_column)[None, :]
            b_block = tl.load(p_images + o_block, mask=m_block).to(tl.float32) * scale + shift
            p_block = p_output + o_patch.to(tl.int64)[:, None] * (3 * P * P) + (c * P * P + o_pixel)[None, :]
            tl.store(p_block, b_block.to(p_output.dtype.element_ty), mask=m_block)


# 4096 pixels a program: each of 128 threads loads 3 x 2 vectors of 16 bytes where a row of a patch is 16 bytes.
_BLOCK_PIXELS = 4096


def launch_embed_patches(images, patch_size, index, mean, std, dtype):
    """The implementation for CUDA tensors: starts the Triton kernel, which is made for three channels."""
    if images.shape[1] != 3:
        return embed_patches_cpu(images, patch_size, index, mean, std, dtype)
    num_images, num_patches = len(images), _num_patches(images, patch_size)
    if index is None:
        num_kept, p_index = num_patches, images  # any pointer will do
    else:
        debug_check_index("index", index, num_patches)
        num_kept, p_index = index.shape[1], contiguous_rows(index)
    output = images.new_empty(num_images, num_kept, 3 * patch_size * patch_size, dtype=dtype)
    scale, shift = scale_and_shift(mean, std)
    block_pixels = min(triton.next_power_of_2(patch_size * patch_size), 1024)
    block_patches = max(1, min(64, _BLOCK_PIXELS // block_pixels))
    launch(
        _embed_patches_kernel,
        triton.cdiv(num_images * num_kept, block_patches),
        images,
        p_index,
        output,
        num_images * num_kept,
        num_kept,
        images.shape[3] // patch_size,
        *images.stride(),
        p_index.stride(0),
        *scale,
        *shift,
        P=patch_size,
        HAS_INDEX=index is not None,
        BLOCK_PATCHES=block_patches,
        BLOCK_PIXELS=block_pixels,
    )
    return output


def embed_patches_cpu(images, patch_size, index, mean, std, dtype):
    """The implementation for CPU tensors, and for CUDA tensors of other than three channels."""
    if index is not None:
        debug_check_index("index", index, _num_patches(images, patch_size))
    return embed_patches_plain(images, patch_size, index, mean=mean, std=std, dtype=dtype)


def _num_patches(images: Tensor, patch_size: int) -> int:
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _empty_output(images, patch_size, index, mean, std, dtype):
    num_kept = _num_patches(images, patch_size) if index is None else index.shape[1]
    return images.new_empty(images.shape[0], num_kept, images.shape[1] * patch_size * patch_size, dtype=dtype)


embed_patches_op = define_operator(
    "embed_patches(Tensor images, SymInt patch_size, Tensor? index, float[] mean, float[] std, ScalarType dtype)"
    " -> Tensor",
    cuda=launch_embed_patches,
    cpu=embed_patches_cpu,
    fake=_empty_output,
)
