"""The encoder: a vision transformer without class token that embeds only the requested patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa import kernels as operators
from dmtjepa.models.attention import choose_attention
from dmtjepa.models.layers import (
    LAYER_NORM_EPS,
    Block,
    LayerNorm,
    initialize_weights,
    resample_position_embedding,
    sincos_position_embedding,
    wider_dtype,
)
from dmtjepa.packing import Packing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Architecture(TypedDict):
    """Keyword arguments of `VisionTransformer` that define its size."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


# Sources: ViT (arXiv 2010.11929); DeiT (arXiv 2012.12877) for tiny and small; I-JEPA for giant. This project adds nano,
# which trains on a CPU.
ARCHITECTURES: dict[str, Architecture] = {
    "vit_nano": {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 4.0},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
}


def default_normalization(num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: ImageNet's for three channels, 0.5 and 0.25 for others."""
    return (IMAGENET_MEAN, IMAGENET_STD) if num_channels == 3 else ((0.5,) * num_channels, (0.25,) * num_channels)


class PatchEmbed(nn.Module):
    """Projects patches of pixels to tokens. The weight has the shape of the convolution in official checkpoints."""

    def __init__(self, patch_size: int, embed_dim: int, num_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(num_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Project [..., C*p*p] pixels of patches in (channel, row, column) order -> [..., D]."""
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """A pre-norm ViT with a fixed sine-cosine position embedding and no class token.

    Args:
        image_size: side, or (height, width), of the images in pixels. For images of another size, the position
            embedding is resampled to their grid.
        patch_size: side of a patch in pixels.
        embed_dim: width D.
        depth: number of transformer blocks.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLPs divided by D.
        num_channels: channels C of the images.
        mean: of each channel, of pixels in [0, 1]; None: see `default_normalization`.
        std: likewise, the standard deviation.
        init_std: standard deviation of the initial weights.
        residual_dtype: dtype of the residual stream where it is wider than that of the weights; None: the same.
        attention: backend, see `choose_attention`.
        device_type: of the device on which the model will run.
        kernels: `triton` or `torch`, see `dmtjepa.kernels.backend`.

    `ARCHITECTURES` lists the sizes by name.

    Raises:
        ValueError: the image size is not a multiple of the patch size, `mean` or `std` has another length, or D is not
            a multiple of `num_heads` or of 4.
    """

    pos_embed: Tensor  # [1, N, D], a buffer

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        num_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        init_std: float = 0.02,
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        kernels: str = "triton",
        device_type: str = "cpu",
    ) -> None:
        super().__init__()
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        if height < patch_size or width < patch_size:
            raise ValueError(f"image size {height}x{width} is smaller than a patch of {patch_size}x{patch_size}")
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
        self._embed_patches = operators.backend(kernels).embed_patches
        self._gather_tokens = operators.backend(kernels).gather_tokens
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.residual_dtype = residual_dtype
        self.grid_size = (height // patch_size, width // patch_size)
        default_mean, default_std = default_normalization(num_channels)
        self.num_channels = num_channels
        self.mean = default_mean if mean is None else tuple(mean)
        self.std = default_std if std is None else tuple(std)
        if not len(self.mean) == len(self.std) == num_channels:
            raise ValueError(f"mean and std must be {num_channels} numbers each, got {self.mean} and {self.std}")
        self.patch_embed = PatchEmbed(patch_size, embed_dim, num_channels)
        self.register_buffer("pos_embed", sincos_position_embedding(self.grid_size, embed_dim)[None])
        attend = choose_attention(attention, device_type, embed_dim // num_heads)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, attend) for _ in range(depth))
        self.norm = LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        initialize_weights(self, init_std)

    def forward(self, images: Tensor, index: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Encode the patches in `index`, or all patches.

        Args:
            images: [B, C, H, W], uint8, or float normalised by `mean` and `std`.
            index: [B, C] int64 patches to encode, numbered in raster order; None for all. Other patches are not read.
                With a packing, [1, L] flat numbers b*N + n.
            packing: the sequences in `index`, if images have different numbers of patches.

        Returns:
            [B, C, D] or [B, N, D] in the dtype of the weights; [1, L, D] with a packing.

        Raises:
            ValueError: the size of the images is not a multiple of the patch size.
        """
        x = self.embed(images, index, packing)
        for block in self.blocks:
            x = block(x, packing)
        return self.norm(x)

    def embed(self, images: Tensor, index: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Return the tokens with position embedding, before the first block. Arguments and shapes as in `forward`."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height}x{width} pixels are no multiple of the patch size {self.patch_size}")
        grid_size = (height // self.patch_size, width // self.patch_size)
        dtype = self.patch_embed.proj.weight.dtype
        position = resample_position_embedding(self.pos_embed[0], self.grid_size, grid_size)
        position = position.to(wider_dtype(dtype, self.residual_dtype))
        if packing is not None:
            # Stack the images to one tall image, in which patch n of image b has the number b*N + n.
            images = images.transpose(0, 1).flatten(1, 2)[None]
        if images.dtype == torch.uint8:
            pixels = self._embed_patches(images, self.patch_size, index, mean=self.mean, std=self.std, dtype=dtype)
        else:
            pixels = patchify(images.to(dtype), self.patch_size)
            if index is not None:
                pixels = self._gather_tokens(pixels, index)
        if index is not None:
            position = F.embedding(index if packing is None else index % len(position), position)
        return self.patch_embed(pixels) + position


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Split images [B, C, H, W] into patches [B, N, C*p*p] in raster order, pixels in (channel, row, column) order."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)
