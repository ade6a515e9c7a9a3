"""The predictor: a narrow vision transformer that predicts each target block from the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.models.attention import choose_attention
from dmtjepa.models.layers import (
    LAYER_NORM_EPS,
    Block,
    LayerNorm,
    Linear,
    initialize_weights,
    sincos_position_embedding,
    wider_dtype,
)
from dmtjepa.packing import PackedSequences


class Predictions(NamedTuple):
    """What the predictor makes of a batch."""

    targets: Tensor  # [B, M, T, D], of the patches of the target blocks
    context: Tensor | None = None  # [B, M, C, D], of the patches that the student sees; packed: [1, 1, P, D]


class Predictor(nn.Module):
    """Predicts each target block separately from the context and the positions of its patches (I-JEPA section 3).

    On demand, it predicts the patches of the context as well (V-JEPA 2.1, arXiv 2603.14482).

    Args:
        grid_size: rows and columns of patches.
        embed_dim: width D of the encoder.
        predictor_dim: width of the predictor.
        depth: number of transformer blocks.
        num_heads: number of attention heads. The official predictors have as many as their encoders.
        init_std: standard deviation of the initial weights.
        residual_dtype: dtype of the residual stream where it is wider than that of the weights; None: the same.
        attention: backend, see `choose_attention`.
        device_type: of the device on which the model will run.

    Raises:
        ValueError: `predictor_dim` is not a multiple of `num_heads` or of 4.
    """

    predictor_pos_embed: Tensor  # [1, N, predictor_dim], a buffer

    def __init__(
        self,
        grid_size: tuple[int, int] = (14, 14),
        embed_dim: int = 768,
        predictor_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        *,
        init_std: float = 0.02,
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        device_type: str = "cpu",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual_dtype = residual_dtype
        self.grid_size = grid_size
        self.predictor_embed = Linear(embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_dim))
        self.register_buffer("predictor_pos_embed", sincos_position_embedding(grid_size, predictor_dim)[None])
        attend = choose_attention(attention, device_type, predictor_dim // num_heads)
        self.predictor_blocks = nn.ModuleList(Block(predictor_dim, num_heads, 4.0, attend) for _ in range(depth))
        self.predictor_norm = LayerNorm(predictor_dim, eps=LAYER_NORM_EPS)
        self.predictor_proj = Linear(predictor_dim, embed_dim)
        initialize_weights(self, init_std)
        nn.init.trunc_normal_(self.mask_token, std=init_std)

    def forward(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        packed: PackedSequences | None = None,
        *,
        with_context: bool = False,
    ) -> Predictions:
        """Predict the targets.

        Args:
            context: [B, C, D] encoded context; [1, L, D] with `packed`.
            context_index: [B, C] int64 numbers of its patches; [1, L] flat numbers b*N + n with `packed`.
            target_index: [B, M, T] int64 patches of the M target blocks.
            packed: the sequences, if images have different numbers of context patches.
            with_context: predict the patches of the context, too, once for each target block.

        Returns:
            Predictions [B, M, T, D] of the targets, and with `with_context` [B, M, C, D] of the context. With `packed`,
            the latter are [1, 1, P, D], of the elements `packed.context`.
        """
        batch, num_blocks, num_targets = target_index.shape
        context = self.predictor_embed(context)
        position = self.predictor_pos_embed[0].to(wider_dtype(context.dtype, self.residual_dtype))
        context = context + F.embedding(context_index if packed is None else context_index % len(position), position)
        queries = self.mask_token.to(context.dtype) + F.embedding(target_index, position)
        if packed is None:
            x = torch.cat([context[:, None].expand(-1, num_blocks, -1, -1), queries], dim=2).flatten(0, 1)
        else:
            x = F.embedding(packed.token_index, torch.cat([context[0], queries.flatten(0, 2)]))
        *blocks, last = self.predictor_blocks
        for block in blocks:
            x = block(x, packed and packed.packing)
        if packed is None and not with_context:
            x = last(x, None, x[:, -num_targets:])  # only the outputs of the targets are used
            return Predictions(self._project(x).view(batch, num_blocks, num_targets, -1))
        x = last(x, packed and packed.packing)
        if packed is None:
            x = self._project(x).unflatten(0, (batch, num_blocks))
            return Predictions(x[:, :, -num_targets:], x[:, :, :-num_targets])
        # What is not used is not projected.
        targets = self._project(x[0].index_select(0, packed.target)).view(batch, num_blocks, num_targets, -1)
        return Predictions(targets, self._project(x[:, packed.context][None]) if with_context else None)

    def _project(self, x: Tensor) -> Tensor:
        """Map the width of the predictor to that of the encoder: [..., predictor_dim] -> [..., D]."""
        projected: Tensor = self.predictor_proj(self.predictor_norm(x))
        return projected
