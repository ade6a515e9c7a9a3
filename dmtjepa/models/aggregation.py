"""The aggregation head of DMT-JEPA: targets from similar neighbours, and its counterpart on the context.

The algebra that makes it cheap (all exact): keys and values depend on a patch alone, so they are projected once per
patch, then gathered; queries, MLPs and outputs exist only for patches that some target block covers; the first block
has one query per image, and the context side one per image and block, so W_k is absorbed into the query and W_v is
applied after pooling. The slow form, which this is tested against, is `dmtjepa.reference.step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa import kernels as operators
from dmtjepa.models.layers import LAYER_NORM_EPS, Linear, Mlp, initialize_weights
from dmtjepa.packing import Packing


class QueryAttention(nn.Module):
    """The projections of single-query attention. Its heads of size E are the rows [h*E, (h+1)*E) of each weight."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def absorb(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores against any key row r as `(key_map @ r + key_bias)`, without projecting r.

        With q = W_q x + b_q per head: q . (W_k r + b_k) = (W_k^T q) . r + q . b_k.

        Args:
            x: [B, D], one query row per image.

        Returns:
            key_map [B, H, D] and key_bias [B, H], both with the softmax scale.
        """
        query = self.q(x).unflatten(-1, (self.num_heads, -1)) * self.scale
        key_map = torch.einsum("bhe,hed->bhd", query, self.k.weight.unflatten(0, (self.num_heads, -1)))
        # q . b_k is the same for all keys and cancels in the softmax; kept, so that b_k has its (zero) gradient.
        key_bias = torch.einsum("bhe,he->bh", query, self.k.bias.unflatten(0, (self.num_heads, -1)))
        return key_map, key_bias

    def project_pooled(self, pooled: Tensor) -> Tensor:
        """W_o (W_v pooled + b_v) for key rows pooled per head, [B, H, D] -> [B, D]; exact as the weights sum to 1."""
        value = torch.einsum("bhd,hed->bhe", pooled, self.v.weight.unflatten(0, (self.num_heads, -1)))
        return self.proj(value.flatten(1) + self.v.bias)


class AggregationBlock(nn.Module):
    """A pre-norm block whose attention has one query: LN1, attention, LN2, MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = QueryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def aggregate_context(self, z: Tensor, packing: Packing | None = None) -> Tensor:
        """One context block: the mean of z attends to [mean; z], and the result is added to every patch."""
        if packing is None:
            mean = z.mean(dim=1)
        else:
            z, present = packing.pad(z), packing.present
            mean = (z * present[:, :, None]).sum(dim=1) / packing.length[:, None]
        rows = self.norm1(z)
        mean = self.norm1(mean)
        key_map, key_bias = self.attn.absorb(mean)
        score = torch.cat([mean[:, None] @ key_map.transpose(1, 2), rows @ key_map.transpose(1, 2)], dim=1)
        score = score + key_bias[:, None]
        if packing is not None:
            score = score.masked_fill(~F.pad(present, (1, 0), value=True)[:, :, None], -torch.inf)
        weight = score.softmax(dim=1)
        pooled = weight[:, 0, :, None] * mean[:, None] + weight[:, 1:].transpose(1, 2) @ rows
        z = z + self.attn.project_pooled(pooled)[:, None]
        if packing is not None:
            z = packing.unpad(z)
        return z + self.mlp(self.norm2(z))

    def finish(self, x: Tensor, aggregated: Tensor) -> Tensor:
        """The rest of the block after the attention, at [U, D]."""
        x = x + self.attn.proj(aggregated)
        return x + self.mlp(self.norm2(x))


class AggregationHead(nn.Module):
    """DMT-JEPA's head of two blocks (paper section 3.2); student and teacher have one each.

    Args:
        embed_dim, num_heads: width D and heads, the encoder's.
        num_neighbors: K, neighbours aggregated into a target.
        window: side of the window they are chosen from, odd.
        border: `wrap` takes the window round the grid (the published code), `clip` keeps to the grid.
        init_std: standard deviation of the initial weights.
        kernels: `triton` or `torch`, see `dmtjepa.kernels.backend`.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_neighbors: int = 4,
        window: int = 3,
        border: str = "wrap",
        *,
        init_std: float = 0.02,
        kernels: str = "triton",
    ) -> None:
        super().__init__()
        if border not in ("wrap", "clip"):
            raise ValueError(f"border {border!r}: choose wrap or clip")
        backend = operators.backend(kernels)
        self._gather_tokens = backend.gather_tokens
        self._select_neighbors = backend.select_neighbors
        self._pool_neighbors = backend.pool_neighbors
        self._aggregate_neighbors = backend.aggregate_neighbors
        self.num_heads = num_heads
        self.num_neighbors = num_neighbors
        self.window = window
        self.border = border
        blocks = nn.ModuleList(AggregationBlock(embed_dim, num_heads) for _ in range(2))
        self.cls_blocks: Sequence[AggregationBlock] = blocks  # type: ignore[assignment]
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        initialize_weights(self, init_std)

    def check_window(self, window: int, border: str) -> None:
        """Check that neighbourhoods were computed for the window and border of this head.

        Otherwise `aggregate_neighbors` would treat neighbours outside of `neighborhood` as missing.

        Raises:
            ValueError: they were computed for another window or border.
        """
        if (window, border) != (self.window, self.border):
            raise ValueError(
                f"the masks were sampled for windows of {window}x{window} patches and border {border!r}, but the "
                f"aggregation head has windows of {self.window}x{self.window} and border {self.border!r}; build both "
                f"from one configuration (MaskSampler.from_config, build_model)"
            )

    def aggregate_context(self, z: Tensor, packing: Packing | None = None) -> Tensor:
        """Aggregate the encoded context over each image: [B, C, D] -> [B, C, D]; [1, L, D] with a packing."""
        for block in self.cls_blocks:
            z = block.aggregate_context(z, packing)
        return self.norm(z)

    def aggregate_neighbors(
        self, h: Tensor, grid_size: tuple[int, int], target_unique: Tensor, neighborhood: Tensor | None = None
    ) -> Tensor:
        """Aggregate each covered patch from its most similar neighbours.

        Args:
            h: [B, N, D] teacher features, layer-normalised.
            grid_size: rows and columns, N = rows * columns.
            target_unique: [U] patches that some target block covers, as b*N + n.
            neighborhood: [R] all patches within the windows of `target_unique`, ascending (`MaskBatch.neighborhood`):
                keys and values are projected at these only. None projects all B*N.

        Returns:
            [U, D] targets.
        """
        batch, num_patches, _ = h.shape
        rows = h.flatten(0, 1)
        image = target_unique // num_patches
        neighbor_index = self._select_neighbors(
            h, target_unique, grid_size, num_neighbors=self.num_neighbors, window=self.window, border=self.border
        )
        if neighborhood is not None:
            rows = self._gather_tokens(rows[None], neighborhood[None])[0]
            neighbor_index = _renumber(neighbor_index, neighborhood, batch * num_patches)

        first, second = self.cls_blocks
        # Block 1: one query per image, the mean of its patches.
        mean = h.mean(dim=1)
        query_row = first.norm1(mean)
        key_map, key_bias = first.attn.absorb(query_row)
        self_score = torch.einsum("bhd,bd->bh", key_map, query_row) + key_bias
        score = (first.norm1(h) @ key_map.transpose(1, 2) + key_bias[:, None]).flatten(0, 1)
        if neighborhood is not None:
            score = score[neighborhood]
        value = first.attn.v(first.norm1(rows))
        pooled = self._pool_neighbors(self_score, first.attn.v(query_row), score, value, neighbor_index, image)
        y = first.finish(mean[image], pooled)
        # Block 2: one query per covered patch.
        query_row, rows = second.norm1(y), second.norm1(rows)
        attn = second.attn
        aggregated = self._aggregate_neighbors(
            attn.q(query_row), attn.k(query_row), attn.v(query_row), attn.k(rows), attn.v(rows), neighbor_index,
            num_heads=self.num_heads,
        )  # fmt: skip
        return self.norm(second.finish(y, aggregated))


def _renumber(neighbor_index: Tensor, neighborhood: Tensor, num_rows: int) -> Tensor:
    """Patch numbers [U, K] as places in `neighborhood` [R]; missing slots stay -1."""
    # One place more than there are patches, so that -1 finds the last, which is -1.
    place = torch.full((num_rows + 1,), -1, dtype=neighbor_index.dtype, device=neighbor_index.device)
    place[neighborhood] = torch.arange(len(neighborhood), dtype=place.dtype, device=place.device)
    return place[neighbor_index]
