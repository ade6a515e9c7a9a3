"""The parts of a pre-norm vision transformer, with the parameter names of the released checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.models.attention import AttentionFunction
from dmtjepa.packing import Packing

LAYER_NORM_EPS = 1e-6


def sincos_position_embedding(grid_size: tuple[int, int], embed_dim: int) -> Tensor:
    """The fixed 2-D sine-cosine position embedding of MAE (arXiv 2111.06377) and I-JEPA.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos] of the position
    times frequencies 10000^(-i / (embed_dim/4)).

    Args:
        grid_size: rows and columns of patches.
        embed_dim: D, a multiple of 4.

    Returns:
        [N, D] float32, patches in raster order.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim}: the 2-D sine-cosine position embedding needs a multiple of 4")
    rows, columns = grid_size
    # In float64, as the released code, so that the table equals the one stored in its checkpoints.
    frequencies = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.double()[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.cat([encode(column), encode(row)], dim=1).float()


def resample_position_embedding(position: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding [N, D] to another grid of patches (bicubic) -> [rows*columns, D]."""
    if from_grid == to_grid:
        return position
    image = position.reshape(1, *from_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=to_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(to_grid[0] * to_grid[1], -1).to(position.dtype)


def initialize_weights(model: nn.Module, std: float) -> None:
    """Draw weights from a truncated normal; biases are 0, LayerNorms 1 and 0.

    Args:
        std: 0.02 in all published models. It suits widths of 768 and more: the smaller the width, the less of the
            input such weights let through.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Linear(nn.Linear):
    """A linear layer [..., K] -> [..., N] whose product, `multiply(x, weight, bias)`, can be exchanged."""

    multiply = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between: [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention [B, L, D] -> [B, L, D] with a joint projection to queries, keys and values.

    With a packing, [1, L, D] holds sequences of different lengths, and each attends to itself.
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

    def attend_from(self, rows: Tensor, x: Tensor) -> Tensor:
        """Attention from `rows` [B, Q, D] alone, which are some rows of x [B, L, D] -> [B, Q, D]."""
        dim = x.shape[-1]
        weight, bias, multiply = self.qkv.weight, self.qkv.bias, self.qkv.multiply
        query = multiply(rows, weight[:dim], bias[:dim]).unflatten(-1, (self.num_heads, -1))
        key, value = multiply(x, weight[dim:], bias[dim:]).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(self.attend(query, key, value, None).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block [B, L, D] -> [B, L, D]; for a packing see `Attention`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attend: AttentionFunction) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attend)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, packing: Packing | None = None, rows: Tensor | None = None) -> Tensor:
        """Where the outputs of `rows` [B, Q, D] alone are needed, which are some rows of x: those, [B, Q, D]."""
        if rows is None:
            x = x + self.attn(self.norm1(x), packing)
        else:
            x = rows + self.attn.attend_from(self.norm1(rows), self.norm1(x))
        return x + self.mlp(self.norm2(x))
