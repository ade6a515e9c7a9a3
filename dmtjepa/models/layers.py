"""Layers of a pre-norm vision transformer, with the parameter names of the official checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.models.attention import AttentionFunction
from dmtjepa.packing import Packing

LAYER_NORM_EPS = 1e-6


def sincos_position_embedding(grid_size: tuple[int, int], embed_dim: int) -> Tensor:
    """Return the fixed 2-D sine-cosine position embedding of MAE (arXiv 2111.06377) and I-JEPA.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos] of the position
    times frequencies 10000^(-i / (embed_dim/4)).

    Args:
        grid_size: rows and columns of patches.
        embed_dim: D, a multiple of 4.

    Returns:
        [N, D] float32, patches in raster order.

    Raises:
        ValueError: `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim}: the 2-D sine-cosine position embedding needs a multiple of 4")
    rows, columns = grid_size
    # In float64, like the official code, so that the table equals the one in official checkpoints.
    frequencies = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.double()[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.cat([encode(column), encode(row)], dim=1).float()


def resample_position_embedding(position: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding [N, D] to another grid of N' patches by bicubic interpolation -> [N', D]."""
    if from_grid == to_grid:
        return position
    image = position.reshape(1, *from_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=to_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(to_grid[0] * to_grid[1], -1).to(position.dtype)


def wider_dtype(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    """Return the dtype that holds all values of both; `dtype` if there is no other."""
    return dtype if other is None else torch.promote_types(dtype, other)


def initialize_weights(model: nn.Module, std: float) -> None:
    """Draw weights from a truncated normal; biases are 0, LayerNorms 1 and 0.

    Args:
        model: all of its Linear, Conv2d and LayerNorm modules are initialised.
        std: standard deviation. All official models use 0.02, which suits widths of 768 and more. In narrower models
            such weights shrink the signal; use a larger value there.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of x [..., D]; the result has the dtype of the weights.

    Unlike PyTorch's, it takes a float32 x with weights of bfloat16, and then computes in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.promote_types(x.dtype, self.weight.dtype) == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(self.weight.dtype)


class Linear(nn.Linear):
    """A linear layer [..., K] -> [..., N]. `replace_method` can replace its `multiply(x, weight, bias)`."""

    multiply = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them: [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention [B, L, D] -> [B, L, D] with one projection for queries, keys and values.

    With a packing, the input [1, L, D] contains sequences of different lengths, and each attends to itself.
    """

    def __init__(self, dim: int, num_heads: int, attend: AttentionFunction) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.attend = attend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(self.attend(query, key, value, packing).flatten(2))

    def attend_from(self, queries: Tensor, x: Tensor) -> Tensor:
        """Attend only from `queries` [B, Q, D], which are some of the tokens x [B, L, D] -> [B, Q, D]."""
        dim = x.shape[-1]
        weight, bias, multiply = self.qkv.weight, self.qkv.bias, self.qkv.multiply
        query = multiply(queries, weight[:dim], bias[:dim]).unflatten(-1, (self.num_heads, -1))
        key, value = multiply(x, weight[dim:], bias[dim:]).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(self.attend(query, key, value, None).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attend: AttentionFunction) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attend)
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, packing: Packing | None = None, queries: Tensor | None = None) -> Tensor:
        """Compute the block.

        Args:
            x: [B, L, D], or [1, L, D] with a packing. It may be float32 with weights of bfloat16.
            packing: sequences of different lengths in x, see `Attention`.
            queries: [B, Q, D], those tokens of x whose outputs are needed; None for all. Not supported with a packing.

        Returns:
            [B, L, D], or [B, Q, D] with `queries`, in the dtype of x.
        """
        if queries is None:
            x = x + self.attn(self.norm1(x), packing)
        else:
            x = queries + self.attn.attend_from(self.norm1(queries), self.norm1(x))
        return x + self.mlp(self.norm2(x))
