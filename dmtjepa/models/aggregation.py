"""The aggregation head of DMT-JEPA (arXiv 2405.17995, section 3.2), for targets and for the context.

Three exact rearrangements make it fast:

* Keys and values depend on one patch only. They are projected once per patch and then gathered.
* Only the patches that some target block covers need queries, MLPs and outputs.
* The first block has one query per image, unless each patch is its own; on the context, each block has one query per
  image. There, W_k is absorbed into the query and W_v is applied after pooling.

`dmtjepa.reference.step` is the slow form that this module is tested against.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa import kernels as operators
from dmtjepa.models.layers import LAYER_NORM_EPS, Linear, Mlp, initialize_weights
from dmtjepa.packing import Packing

# What a target starts from, see `AggregationHead`.
Query = Literal["image", "targets", "patch"]


class QueryAttention(nn.Module):
    """The projections of single-query attention. Head h of size E has the rows [h*E, (h+1)*E) of each weight."""

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
        """Return a map that computes the score of any token r as `key_map @ r + key_bias`, without projecting r.

        With q = W_q x + b_q per head: q . (W_k r + b_k) = (W_k^T q) . r + q . b_k.

        Args:
            x: [B, D], one query token per image.

        Returns:
            key_map [B, H, D] and key_bias [B, H], both multiplied by the softmax scale.
        """
        query = self.q(x).unflatten(-1, (self.num_heads, -1)) * self.scale
        key_map = torch.einsum("bhe,hed->bhd", query, self.k.weight.unflatten(0, (self.num_heads, -1)))
        # q . b_k is the same for all keys and cancels in the softmax. It is kept so that b_k has its (zero) gradient.
        key_bias = torch.einsum("bhe,he->bh", query, self.k.bias.unflatten(0, (self.num_heads, -1)))
        return key_map, key_bias

    def project_pooled(self, pooled: Tensor) -> Tensor:
        """Compute W_o (W_v pooled + b_v) for tokens pooled per head: [B, H, D] -> [B, D]. Exact if weights sum to 1."""
        value = torch.einsum("bhd,hed->bhe", pooled, self.v.weight.unflatten(0, (self.num_heads, -1)))
        return self.proj(value.flatten(1) + self.v.bias)


class AggregationBlock(nn.Module):
    """A pre-norm transformer block whose attention has one query."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = QueryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def aggregate_context(self, z: Tensor, packing: Packing | None = None) -> Tensor:
        """Add what the mean of z finds in [mean; z] to every patch, then the MLP.

        Args:
            z: [B, C, D] encoded context, or [1, L, D] with a packing.
            packing: which elements of z belong to which image.

        Returns:
            A tensor of the shape of z.
        """
        if packing is None:
            mean = z.mean(dim=1)
        else:
            z, present = packing.pad(z), packing.present()
            mean = (z * present[:, :, None]).sum(dim=1) / packing.lengths()[:, None]
        tokens = self.norm1(z)
        mean = self.norm1(mean)
        key_map, key_bias = self.attn.absorb(mean)
        score = torch.cat([mean[:, None] @ key_map.transpose(1, 2), tokens @ key_map.transpose(1, 2)], dim=1)
        score = score + key_bias[:, None]
        if packing is not None:
            score = score.masked_fill(~F.pad(present, (1, 0), value=True)[:, :, None], -torch.inf)
        weight = score.softmax(dim=1)
        pooled = weight[:, 0, :, None] * mean[:, None] + weight[:, 1:].transpose(1, 2) @ tokens
        z = z + self.attn.project_pooled(pooled)[:, None]
        if packing is not None:
            z = packing.unpad(z)
        return z + self.mlp(self.norm2(z))

    def finish(self, x: Tensor, aggregated: Tensor) -> Tensor:
        """Compute the rest of the block from the input x and the attention's output, both [U, D]."""
        x = x + self.attn.proj(aggregated)
        return x + self.mlp(self.norm2(x))


class AggregationHead(nn.Module):
    """The aggregation head of two blocks (DMT-JEPA section 3.2). Student and teacher have one each.

    Args:
        embed_dim: width D of the encoder.
        num_heads: number of attention heads of the encoder.
        num_neighbors: number of neighbours K that are aggregated into a target.
        window: side of the window from which the neighbours are chosen, in patches; odd.
        border: `wrap` continues the window at the opposite edge of the grid, as the official code does; `clip` ends it
            at the edge.
        query: the first query of a target, to which both blocks add: `image` is the mean of the image's patches, as in
            the official code; `targets` is the mean of the patches that its target blocks cover, each counted once, as
            the paper's text has it; `patch` is the target patch itself.
        init_std: standard deviation of the initial weights.
        kernels: `triton` or `torch`, see `dmtjepa.kernels.backend`.

    Raises:
        ValueError: `border` or `query` is unknown, or `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_neighbors: int = 4,
        window: int = 3,
        border: str = "wrap",
        query: Query = "image",
        *,
        init_std: float = 0.02,
        kernels: str = "triton",
    ) -> None:
        super().__init__()
        if border not in ("wrap", "clip"):
            raise ValueError(f"border {border!r}: choose wrap or clip")
        if query not in get_args(Query):
            raise ValueError(f"query {query!r}: choose image, targets or patch")
        backend = operators.backend(kernels)
        self._gather_tokens = backend.gather_tokens
        self._select_neighbors = backend.select_neighbors
        self._pool_neighbors = backend.pool_neighbors
        self._aggregate_neighbors = backend.aggregate_neighbors
        self.num_heads = num_heads
        self.num_neighbors = num_neighbors
        self.window = window
        self.border = border
        self.query = query
        self.cls_blocks = nn.ModuleList(AggregationBlock(embed_dim, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        initialize_weights(self, init_std)

    @property
    def blocks(self) -> list[AggregationBlock]:
        """The two blocks. Their parameters are named `cls_blocks`, as in official checkpoints."""
        return cast("list[AggregationBlock]", list(self.cls_blocks))

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
        """Aggregate the encoded context over each image.

        Args:
            z: [B, C, D], or [1, L, D] with a packing.
            packing: which elements of z belong to which image.

        Returns:
            A tensor of the shape of z.
        """
        for block in self.blocks:
            z = block.aggregate_context(z, packing)
        return self.norm(z)

    def aggregate_neighbors(
        self,
        h: Tensor,
        grid_size: tuple[int, int],
        target_unique: Tensor,
        neighborhood: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """Aggregate each covered patch from its most similar neighbours.

        Args:
            h: [B, N, D] layer-normalised features of the teacher.
            grid_size: rows and columns of the grid, with N = rows * columns.
            target_unique: [U] int64 flat numbers b*N + n of the patches that some target block covers.
            neighborhood: [R] int64 flat numbers of all patches in the windows around `target_unique`, ascending
                (`MaskBatch.neighborhood`). Keys and values are projected for these patches only; None projects all.
            others: [V] int64 flat numbers of further patches to aggregate, which no target block need cover. Needs
                `neighborhood` None.

        Returns:
            [U, D] targets, or [U + V, D] with `others`.

        Raises:
            ValueError: there are both `neighborhood` and `others`.
        """
        if neighborhood is not None and others is not None:
            raise ValueError(
                "neighborhood holds the windows around target_unique alone: others needs neighborhood=None"
            )
        batch, num_patches, _ = h.shape
        patches = target_unique if others is None else torch.cat([target_unique, others])
        tokens = h.flatten(0, 1)
        neighbor_index = self._select_neighbors(
            h, patches, grid_size, num_neighbors=self.num_neighbors, window=self.window, border=self.border
        )
        if neighborhood is not None:
            tokens = self._gather_tokens(tokens[None], neighborhood[None])[0]
            neighbor_index = _renumber(neighbor_index, neighborhood, batch * num_patches)

        first, second = self.blocks
        if self.query == "patch":
            query = self._gather_tokens(h.flatten(0, 1)[None], patches[None])[0]
            y = self._add_neighbors(first, query, tokens, neighbor_index)
        else:
            query = h.mean(dim=1) if self.query == "image" else _mean_of_targets(h, target_unique)
            image = patches // num_patches
            y = self._pool_by_image(first, query, h, tokens, neighborhood, neighbor_index, image)
        return self.norm(self._add_neighbors(second, y, tokens, neighbor_index))

    def _pool_by_image(
        self,
        block: AggregationBlock,
        query: Tensor,
        h: Tensor,
        tokens: Tensor,
        neighborhood: Tensor | None,
        neighbor_index: Tensor,
        image: Tensor,
    ) -> Tensor:
        """Compute a block with one query per image.

        Args:
            query: [B, D].
            h: [B, N, D] all patches.
            tokens: [R, D] patches `neighborhood` of h.
            neighbor_index: [U, K] positions in `tokens`.
            image: [U] image of each covered patch.

        Returns:
            [U, D], the query of its image and what it finds in the neighbours of each covered patch.
        """
        query_token = block.norm1(query)
        key_map, key_bias = block.attn.absorb(query_token)
        self_score = torch.einsum("bhd,bd->bh", key_map, query_token) + key_bias
        score = (block.norm1(h) @ key_map.transpose(1, 2) + key_bias[:, None]).flatten(0, 1)
        if neighborhood is not None:
            score = score[neighborhood]
        value = block.attn.v(block.norm1(tokens))
        pooled = self._pool_neighbors(self_score, block.attn.v(query_token), score, value, neighbor_index, image)
        return block.finish(query[image], pooled)

    def _add_neighbors(self, block: AggregationBlock, x: Tensor, tokens: Tensor, neighbor_index: Tensor) -> Tensor:
        """Compute a block with one query per covered patch.

        Args:
            x: [U, D] queries.
            tokens: [R, D] patches of the neighbourhood.
            neighbor_index: [U, K] positions in `tokens`.

        Returns:
            [U, D].
        """
        query_token, tokens = block.norm1(x), block.norm1(tokens)
        attn = block.attn
        aggregated = self._aggregate_neighbors(
            attn.q(query_token), attn.k(query_token), attn.v(query_token), attn.k(tokens), attn.v(tokens),
            neighbor_index, num_heads=self.num_heads,
        )  # fmt: skip
        return block.finish(x, aggregated)


def _mean_of_targets(h: Tensor, target_unique: Tensor) -> Tensor:
    """Mean over the covered patches of each image: h [B, N, D], target_unique [U] -> [B, D]."""
    # A product with 0 and 1 adds in the same order on every run, which scattered additions on a GPU do not.
    covered = h.new_zeros(h.shape[0] * h.shape[1]).index_fill(0, target_unique, 1.0).unflatten(0, h.shape[:2])
    count = covered.sum(dim=1, keepdim=True, dtype=torch.float32)
    return (torch.bmm(covered[:, None], h)[:, 0] / count).to(h.dtype)


def _renumber(neighbor_index: Tensor, neighborhood: Tensor, num_patches: int) -> Tensor:
    """Convert flat patch numbers [U, K] to positions in `neighborhood` [R]. Missing neighbours stay -1."""
    # The additional last element is -1, and index -1 finds it.
    place = torch.full((num_patches + 1,), -1, dtype=neighbor_index.dtype, device=neighbor_index.device)
    place[neighborhood] = torch.arange(len(neighborhood), dtype=place.dtype, device=place.device)
    return place[neighbor_index]
