"""embed_patches: uint8 images to normalised patch rows, at the kept patches only.

    images  [B, 3, H, W] or [B, H, W, 3]   uint8, any strides
    index   [B, K]                         int32 or int64 in [0, N), N = (H / p) * (W / p); None keeps all N in order
    output  [B, K, 3*p*p]                  columns in (channel, row, column) order, the order of conv.weight.flatten(1)

    output[b, k, c, i, j] = (images[b, c, p*r + i, p*s + j] / 255 - mean[c]) / std[c], (r, s) = divmod(index[b, k], W/p)

The patch embedding is then one matrix product, `rows @ conv.weight.flatten(1).T + conv.bias`, and neither a float image
nor the embedding of a dropped patch ever exists.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOAT_DTYPES, INDEX_DTYPES, accumulation_dtype, check_same_device, check_tensor, debug_check_index
from .launch import contiguous_rows, launch


def embed_patches_reference(
    images: Tensor,
    patch_size: int,
    index: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, one patch at a time."""
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    num_images, _, height, width = images.shape
    cols = width // patch_size
    if index is None:
        index = torch.arange(height // patch_size * cols).expand(num_images, -1)
    wide = accumulation_dtype(dtype)
    mean, std = (torch.tensor(values, dtype=wide).view(3, 1, 1) for values in (mean, std))
    rows = []
    for image, image_index in zip(images.cpu(), index.tolist(), strict=True):
        for n in image_index:
            top, left = n // cols * patch_size, n % cols * patch_size
            patch = image[:, top : top + patch_size, left : left + patch_size].to(wide)
            rows.append(((patch / 255 - mean) / std).flatten())
    row_size = 3 * patch_size * patch_size
    stacked = torch.stack(rows) if rows else torch.empty(0, row_size)
    return stacked.view(*index.shape, row_size).to(images.device, dtype)


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
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    num_images, _, height, width = images.shape
    rows, cols = height // patch_size, width // patch_size
    # [B, 3, rows, p, cols, p] -> [B, rows, cols, 3, p, p], a view
    patches = images.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size)).permute(0, 2, 4, 1, 3, 5)
    if index is None:
        patches = patches.reshape(num_images, rows * cols, 3, patch_size * patch_size)
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
    p_index,  # [B, K], strides (s_index_image, 1); unused without HAS_INDEX
    p_output,  # [B, K, 3*P*P], contiguous
    num_rows,  # B*K
    num_kept,  # K
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One program normalises BLOCK_ROWS patches, a channel (or BLOCK_PIXELS pixels of it) at a time."""
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < num_rows
    b_image = (o_row // num_kept).to(tl.int64)
    b_patch = o_row % num_kept
    if HAS_INDEX:
        b_patch = tl.load(p_index + b_image * s_index_image + b_patch, mask=m_row, other=0).to(tl.int32)
    o_top = (b_patch // grid_cols * P).to(tl.int64) * s_row
    o_left = (b_patch % grid_cols * P).to(tl.int64) * s_column
    o_patch = b_image * s_image + o_top + o_left

    for c in tl.static_range(3):
        scale = scale_r if c == 0 else (scale_g if c == 1 else scale_b)
        shift = shift_r if c == 0 else (shift_g if c == 1 else shift_b)
        for start in tl.static_range(0, P * P, BLOCK_PIXELS):
            o_pixel = start + tl.arange(0, BLOCK_PIXELS)
            m_tile = m_row[:, None] & (o_pixel < P * P)[None, :]
            o_tile = o_patch[:, None] + (c * s_channel + o_pixel // P * s_row + o_pixel % P * s_column)[None, :]
            b_tile = tl.load(p_images + o_tile, mask=m_tile).to(tl.float32) * scale + shift
            p_tile = p_output + o_row.to(tl.int64)[:, None] * (3 * P * P) + (c * P * P + o_pixel)[None, :]
            tl.store(p_tile, b_tile.to(p_output.dtype.element_ty), mask=m_tile)


# 4096 pixels a program: each of 128 threads loads 3 x 2 vectors of 16 bytes where a patch row is 16 bytes.
_TILE_PIXELS = 4096


def launch_embed_patches(
    images: Tensor, patch_size: int, index: Tensor | None, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    num_images, _, height, width = images.shape
    num_patches = height // patch_size * (width // patch_size)
    if index is None:
        num_kept, table = num_patches, images
    else:
        debug_check_index("index", index, num_patches)
        num_kept, table = index.shape[1], contiguous_rows(index)
    output = images.new_empty(num_images, num_kept, 3 * patch_size * patch_size, dtype=dtype)
    scale, shift = scale_and_shift(mean, std)
    block_pixels = min(triton.next_power_of_2(patch_size * patch_size), 1024)
    block_rows = max(1, min(64, _TILE_PIXELS // block_pixels))
    launch(
        _embed_patches_kernel,
        triton.cdiv(num_images * num_kept, block_rows),
        images,
        table,
        output,
        num_images * num_kept,
        num_kept,
        width // patch_size,
        *images.stride(),
        table.stride(0),
        *scale,
        *shift,
        P=patch_size,
        HAS_INDEX=index is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_PIXELS=block_pixels,
    )
    return output


def embed_patches_cpu(
    images: Tensor, patch_size: int, index: Tensor | None, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    if index is not None:
        debug_check_index("index", index, _num_patches(images, patch_size))
    return embed_patches_plain(images, patch_size, index, mean=mean, std=std, dtype=dtype)


embed_patches_op = torch.library.custom_op(
    "dmtjepa::embed_patches", launch_embed_patches, mutates_args=(), device_types="cuda"
)
embed_patches_op.register_kernel("cpu", embed_patches_cpu)


@embed_patches_op.register_fake
def _(
    images: Tensor, patch_size: int, index: Tensor | None, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    num_kept = _num_patches(images, patch_size) if index is None else index.shape[1]
    return images.new_empty(images.shape[0], num_kept, 3 * patch_size * patch_size, dtype=dtype)


def _num_patches(images: Tensor, patch_size: int) -> int:
    height, width = images.shape[2:] if images.shape[1] == 3 else images.shape[1:3]
    return (height // patch_size) * (width // patch_size)


def check_arguments(
    images: Tensor,
    patch_size: int,
    index: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    check_tensor("images", images, 4, (torch.uint8,))
    check_same_device("images", images)
    if images.shape[1] != 3 and images.shape[3] != 3:
        raise ValueError(f"images must be [B, 3, H, W] or [B, H, W, 3], got {list(images.shape)}")
    height, width = images.shape[2:] if images.shape[1] == 3 else images.shape[1:3]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels does not divide into patches of {patch_size}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std positive, got {mean} and {std}")
    if dtype not in FLOAT_DTYPES or (dtype == torch.float64 and images.device.type == "cuda"):
        raise TypeError(f"dtype must be bfloat16, float16 or float32 (float64 on the CPU alone), got {dtype}")
    if index is not None:
        check_tensor("index", index, 2, INDEX_DTYPES)
        check_same_device("images", images, index=index)
        if index.shape[0] != images.shape[0]:
            raise ValueError(f"index has {index.shape[0]} rows but there are {images.shape[0]} images")


def embed_patches(
    images: Tensor,
    patch_size: int,
    index: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised rows of the patches `index` of each image, ready for the patch embedding's matrix product.

    Args:
        images: uint8 [B, 3, H, W] or [B, H, W, 3], H and W multiples of `patch_size`; a channel count of 3 in the
            second dimension is read as the former.
        patch_size: pixels of a patch's side, p.
        index: [B, K], int32 or int64 in [0, N); None keeps all patches in raster order.
        mean, std: per channel, of pixels scaled to [0, 1].
        dtype: of the result; the arithmetic is float32 (float64 for float64).

    Returns:
        [B, K or N, 3*p*p]. Not differentiable: the input is bytes.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: in debug mode, an index out of range.
    """
    check_arguments(images, patch_size, index, mean, std, dtype)
    return embed_patches_op(images, patch_size, index, list(mean), list(std), dtype)
