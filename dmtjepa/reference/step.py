"""A slow and simple training step that everything else is tested against.

It is plain eager PyTorch and follows the method operation by operation, with one correction of the official code: the
query of the first block of the target head is the mean of the *same* image. It shares no code with the fast
implementation. Functions take the parameters of a module by name, so that gradients reach the compared parameters.

Sources: I-JEPA (arXiv 2301.08243) section 3, DMT-JEPA (arXiv 2405.17995) section 3; `docs/differences.md`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dmtjepa.objective import DMTJEPA

Parameters = dict[str, Tensor]

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def parameters_of(module: nn.Module) -> Parameters:
    """Return parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)


def _mlp(p: Parameters, name: str, x: Tensor) -> Tensor:
    return _linear(p, f"{name}.fc2", F.gelu(_linear(p, f"{name}.fc1", x)))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split heads: [B, L, D] -> [B, H, L, E]."""
    return x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)


def _block(p: Parameters, name: str, x: Tensor, num_heads: int) -> Tensor:
    """Compute a pre-norm transformer block: [B, L, D] -> [B, L, D]."""
    query, key, value = _linear(p, f"{name}.attn.qkv", _layer_norm(p, f"{name}.norm1", x)).chunk(3, dim=-1)
    query, key, value = (_split_heads(t, num_heads) for t in (query, key, value))
    attention = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    x = x + _linear(p, f"{name}.attn.proj", (attention @ value).transpose(1, 2).reshape(x.shape))
    return x + _mlp(p, f"{name}.mlp", _layer_norm(p, f"{name}.norm2", x))


def normalize_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 images [B, 3, H, W] by ImageNet's mean and standard deviation, in `dtype`."""
    mean = torch.tensor(PIXEL_MEAN, dtype=dtype)[:, None, None]
    std = torch.tensor(PIXEL_STD, dtype=dtype)[:, None, None]
    return (images.to(dtype) / 255 - mean) / std


def take_patches(x: Tensor, index: Tensor) -> Tensor:
    """Select patches: x [B, N, D], index [B, K] -> [B, K, D]."""
    return torch.stack([image[places] for image, places in zip(x, index, strict=True)])


def encode(p: Parameters, images: Tensor, num_heads: int, index: Tensor | None = None) -> Tensor:
    """Encode normalised images: [B, 3, H, W] -> [B, N, D], or [B, C, D] for the patches `index` [B, C]."""
    weight = p["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, p["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + p["pos_embed"].to(x.dtype)
    if index is not None:
        x = take_patches(x, index)
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for i in range(depth):
        x = _block(p, f"blocks.{i}", x, num_heads)
    return _layer_norm(p, "norm", x)


def predict(p: Parameters, context: Tensor, context_index: Tensor, target_index: Tensor, num_heads: int) -> Tensor:
    """Predict one target block after the other: [B, C, D], [B, C], [B, M, T] -> [B, M, T, D] (I-JEPA section 3)."""
    return predict_all(p, context, context_index, target_index, num_heads)[:, :, context.shape[1] :]


def predict_all(p: Parameters, context: Tensor, context_index: Tensor, target_index: Tensor, num_heads: int) -> Tensor:
    """Predict context and target patches with one target block after the other: -> [B, M, C + T, D]."""
    batch = context.shape[0]
    context = _linear(p, "predictor_embed", context)
    position = p["predictor_pos_embed"].to(context.dtype).expand(batch, -1, -1)
    context = context + take_patches(position, context_index)
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("predictor_blocks."))
    predictions = []
    for m in range(target_index.shape[1]):
        x = torch.cat([context, p["mask_token"] + take_patches(position, target_index[:, m])], dim=1)
        for i in range(depth):
            x = _block(p, f"predictor_blocks.{i}", x, num_heads)
        x = _layer_norm(p, "predictor_norm", x)
        predictions.append(_linear(p, "predictor_proj", x))
    return torch.stack(predictions, dim=1)


def window_patches(patch: int, grid_size: tuple[int, int], window: int, border: str) -> list[int]:
    """Return the other patches in the window around a patch, ascending."""
    rows, columns = grid_size
    row, column = divmod(patch, columns)
    reach = window // 2
    found = set()
    for r in range(row - reach, row + reach + 1):
        for c in range(column - reach, column + reach + 1):
            if border == "wrap":
                found.add(r % rows * columns + c % columns)
            elif 0 <= r < rows and 0 <= c < columns:
                found.add(r * columns + c)
    return sorted(found - {patch})


def choose_neighbors(
    h: Tensor, grid_size: tuple[int, int], num_neighbors: int, window: int, border: str
) -> tuple[Tensor, Tensor]:
    """Choose the patches with the largest cosine similarity in the window of each patch.

    Of equally similar patches, those with lower numbers are chosen.

    Args:
        h: [B, N, D] features.

    Returns:
        index: [B, N, K] int64 patches.
        present: [B, N, K] bool, False for missing neighbours, in windows with fewer than K other patches.
    """
    width = window * window - 1
    windows = [window_patches(patch, grid_size, window, border) for patch in range(h.shape[1])]
    candidates = torch.tensor([others + [0] * (width - len(others)) for others in windows])
    present = torch.tensor([[place < len(others) for place in range(width)] for others in windows])
    unit = F.normalize(h, dim=-1)
    similarity = (unit[:, candidates] @ unit.unsqueeze(-1)).squeeze(-1)  # [B, N, w*w-1]
    similarity = similarity.masked_fill(~present, -math.inf)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices[..., :num_neighbors]
    return (
        candidates.expand(len(h), -1, -1).gather(2, order),
        present.expand(len(h), -1, -1).gather(2, order),
    )


def _query_attention(p: Parameters, name: str, x: Tensor, num_heads: int, present: Tensor | None = None) -> Tensor:
    """Attend from the first token of x [B, L, D] to all tokens -> [B, 1, D]. `present` [B, L] marks existing keys."""
    query = _split_heads(_linear(p, f"{name}.q", x[:, :1]), num_heads)
    key = _split_heads(_linear(p, f"{name}.k", x), num_heads)
    value = _split_heads(_linear(p, f"{name}.v", x), num_heads)
    score = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if present is not None:
        score = score.masked_fill(~present[:, None, None], -math.inf)
    out = (score.softmax(dim=-1) @ value).transpose(1, 2).reshape(x.shape[0], 1, -1)
    return _linear(p, f"{name}.proj", out)


def aggregate_neighbors(
    p: Parameters,
    h: Tensor,
    grid_size: tuple[int, int],
    num_heads: int,
    num_neighbors: int = 4,
    window: int = 3,
    border: str = "wrap",
    query_name: str = "image",
    target_index: Tensor | None = None,
) -> Tensor:
    """Aggregate the neighbours of every patch: [B, N, D] -> [B, N, D] (DMT-JEPA section 3.2).

    `target_index` [B, M, T] is needed for the query `targets`.
    """
    batch, num_patches, dim = h.shape
    index, present = choose_neighbors(h, grid_size, num_neighbors, window, border)
    neighbors = h.gather(1, index.flatten(1)[..., None].expand(-1, -1, dim)).reshape(-1, num_neighbors, dim)
    present = torch.cat([torch.ones(batch * num_patches, 1, dtype=torch.bool), present.flatten(0, 1)], dim=1)
    # The official code repeats the means in an order that does not match the patches' images. This order does.
    query = _first_query(h, query_name, target_index).flatten(0, 1)[:, None]  # [B*N, 1, D]
    for i in range(2):
        tokens = _layer_norm(p, f"cls_blocks.{i}.norm1", torch.cat([query, neighbors], dim=1))
        query = query + _query_attention(p, f"cls_blocks.{i}.attn", tokens, num_heads, present)
        query = query + _mlp(p, f"cls_blocks.{i}.mlp", _layer_norm(p, f"cls_blocks.{i}.norm2", query))
    return _layer_norm(p, "norm", query.reshape(h.shape))


def _first_query(h: Tensor, name: str, target_index: Tensor | None) -> Tensor:
    """Return the first query of every patch: [B, N, D] -> [B, N, D]."""
    if name == "patch":
        return h
    if name == "image":
        return h.mean(dim=1, keepdim=True).expand_as(h)
    assert target_index is not None
    means = [image[blocks.unique()].mean(dim=0) for image, blocks in zip(h, target_index, strict=True)]
    return torch.stack(means)[:, None].expand_as(h)


def aggregate_context(p: Parameters, z: Tensor, num_heads: int) -> Tensor:
    """Aggregate the context: [B, C, D] -> [B, C, D]. What the mean attends to is added to every patch."""
    for i in range(2):
        tokens = _layer_norm(p, f"cls_blocks.{i}.norm1", torch.cat([z.mean(dim=1, keepdim=True), z], dim=1))
        z = z + _query_attention(p, f"cls_blocks.{i}.attn", tokens, num_heads)
        z = z + _mlp(p, f"cls_blocks.{i}.mlp", _layer_norm(p, f"cls_blocks.{i}.norm2", z))
    return _layer_norm(p, "norm", z)


def compute_targets(model: DMTJEPA, images: Tensor, target_index: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Compute the targets [B, M, T, D] of normalised images with the teacher.

    With `wanted` [B, m, t], those of these patches are returned: [B, m, t, D].
    """
    wanted = target_index if wanted is None else wanted
    encoder, head = model.teacher_encoder, model.teacher_head
    with torch.no_grad():
        h = encode(parameters_of(encoder), images, encoder.num_heads)
        h = F.layer_norm(h, h.shape[-1:])
        if head is not None:
            grid_size = (images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size)
            choice = head.num_neighbors, head.window, head.border, head.query
            h = aggregate_neighbors(parameters_of(head), h, grid_size, head.num_heads, *choice, target_index)
        return torch.stack([take_patches(h, index) for index in wanted.unbind(1)], dim=1)


def predict_targets(
    model: DMTJEPA, images: Tensor, context_index: Tensor | Sequence[Tensor], target_index: Tensor
) -> Tensor:
    """Compute the predictions [B, M, T, D] for normalised images with the student.

    `context_index` is [B, C], or B tensors of different lengths.
    """
    if not isinstance(context_index, Tensor):
        each = zip(images.split(1), context_index, target_index.split(1), strict=True)
        return torch.cat([predict_targets(model, image, index[None], blocks) for image, index, blocks in each])
    predictor = model.predictor
    z = encode_context(model, images, context_index)
    return predict(parameters_of(predictor), z, context_index, target_index, predictor.num_heads)


def encode_context(model: DMTJEPA, images: Tensor, context_index: Tensor) -> Tensor:
    """Encode, and with a head aggregate, what the student sees: -> [B, C, D]."""
    encoder, head = model.encoder, model.head
    z = encode(parameters_of(encoder), images, encoder.num_heads, context_index)
    return z if head is None else aggregate_context(parameters_of(head), z, head.num_heads)


def compute_loss(
    model: DMTJEPA,
    images: Tensor,
    context_index: Tensor | Sequence[Tensor],
    target_index: Tensor,
    loss: str = "smooth_l1",
    context_loss: float = 0.0,
) -> Tensor:
    """Compute the loss of a batch of normalised images. `context_index` is as in `predict_targets`.

    `context_loss` is the weight of the mean loss of the patches that the student sees (arXiv 2603.14482).
    """
    targets = compute_targets(model, images, target_index)
    predictions = predict_targets(model, images, context_index, target_index)
    total = mean_distance(predictions, targets, loss)
    if not context_loss:
        return total
    num_blocks, found, expected = target_index.shape[1], [], []
    for image, seen, blocks in zip(images.split(1), context_index, target_index.split(1), strict=True):
        z = encode_context(model, image, seen[None])
        predictor = model.predictor
        both = predict_all(parameters_of(predictor), z, seen[None], blocks, predictor.num_heads)
        found.append(both[:, :, : len(seen)].flatten(0, 2))
        wanted = seen[None, None].expand(-1, num_blocks, -1)
        expected.append(compute_targets(model, image, blocks, wanted).flatten(0, 2))
    return total + context_loss * mean_distance(torch.cat(found), torch.cat(expected), loss)


def mean_distance(predictions: Tensor, targets: Tensor, loss: str) -> Tensor:
    """The mean over all elements of the smooth L1 distance with beta 1, or of the squared distance (`l2`)."""
    if loss == "l2":
        return ((predictions - targets) ** 2).mean()
    distance = (predictions - targets).abs()
    return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()


def train(
    model: DMTJEPA,
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    momenta: Sequence[float],
) -> tuple[DMTJEPA, list[float]]:
    """Train a copy of a model, one step per batch (images, context_index, target_index).

    Each step applies AdamW (arXiv 1711.05101, betas 0.9 and 0.999, eps 1e-8) without weight decay for biases and
    vectors, then updates the average of the teacher.

    Returns:
        The trained copy and the loss of each step.
    """
    model = copy.deepcopy(model)
    student = [m for m in (model.encoder, model.predictor, model.head) if m is not None]
    pairs: list[tuple[nn.Module, nn.Module]] = [(model.teacher_encoder, model.encoder)]
    if model.teacher_head is not None and model.head is not None:
        pairs.append((model.teacher_head, model.head))
    trained = [p for module in student for p in module.parameters()]
    first = [torch.zeros_like(p) for p in trained]
    second = [torch.zeros_like(p) for p in trained]
    losses = []
    for step, (images, context_index, target_index) in enumerate(batches):
        loss = compute_loss(model, images, context_index, target_index)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        losses.append(loss.item())
        lr, decay = learning_rates[step], weight_decays[step]
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                if g is None:
                    continue
                if p.ndim > 1:
                    p.mul_(1 - lr * decay)
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                p.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
            for teacher, trained_module in pairs:
                for average, p in zip(teacher.parameters(), trained_module.parameters(), strict=True):
                    average.copy_(momenta[step] * average + (1 - momenta[step]) * p)
    return model, losses
