"""Attentive probes: classification of frozen patch features by attention pooling and a linear layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.linear import MIN_ROWS

HEAD_DIM = 64
EPOCHS, MIN_STEPS, BATCH_SIZE = 20, 1000, 128
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2


class AttentiveProbe(nn.Module):
    """Cross-attention of one learnt query to the patches of an image, then a linear layer.

    V-JEPA (arXiv 2404.08471, section 4) and AIM (arXiv 2401.08541, section 3) evaluate frozen features in this way;
    V-JEPA adds an MLP after the attention, which this probe, like AIM's, leaves out. The key projection is absorbed
    into the query: q W_k x = (W_k^T q) x, so that `query` has one row of D numbers per head. Values are projected after
    pooling, which is the same since the projection is linear.

    Args:
        num_classes: number L of classes.
        mean, scale: of the patch features in each dimension [D]; the probe standardises its input by them.
        generator: draws the weights.
    """

    def __init__(self, num_classes: int, mean: Tensor, scale: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        dim = len(mean)
        num_heads = math.gcd(max(1, dim // HEAD_DIM), dim)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.query = nn.Parameter(0.02 * torch.randn(num_heads, dim, generator=generator))
        self.value = nn.Parameter(torch.randn(num_heads, dim, dim // num_heads, generator=generator) / dim**0.5)
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.zeros(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    mean: Tensor
    scale: Tensor

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features [B,N,D] -> logits [B,L]."""
        return F.linear(self.norm(self.pool(patches)), self.weight, self.bias)

    def pool(self, patches: Tensor) -> Tensor:
        """What the query attends to: patch features [B,N,D] -> [B,D]."""
        x = (patches - self.mean) / self.scale
        attention = (x @ self.query.T).softmax(1)  # [B,N,heads]
        pooled = attention.transpose(1, 2) @ x  # [B,heads,D]
        return torch.einsum("bhd,hdv->bhv", pooled, self.value).flatten(1)

    @torch.no_grad()
    def accuracy(self, patches: Tensor, labels: Tensor) -> float:
        """Share (0 to 1) of images whose class is predicted: float [n,N,D], int64 [n]."""
        device = self.query.device
        correct = sum(
            int((self(batch.to(device).float()).argmax(1) == target.to(device)).sum())
            for batch, target in zip(patches.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
        )
        return correct / len(labels)


@torch.enable_grad()
def fit_attentive(patches: Tensor, labels: Tensor, *, device: torch.device | str = "cpu") -> AttentiveProbe:
    """Fit an attentive probe with AdamW: 20 epochs, at least 1,000 steps, in batches of 128.

    The learning rate falls from 3e-3 to 0 as a cosine; the weight decay is 0.01. Weights and the order of the images
    are drawn with a fixed seed, and PyTorch's generators are not touched.

    Args:
        patches: float [n,N,D], of a frozen encoder. labels: int64 [n], classes from 0.

    Raises:
        EvaluationError: fewer than 10 images.
    """
    if len(patches) < MIN_ROWS:
        raise EvaluationError(f"an attentive probe needs at least {MIN_ROWS} labelled images, not {len(patches)}")
    generator = torch.Generator().manual_seed(0)
    std, mean = torch.std_mean(patches.flatten(0, 1).float(), dim=0)
    scale = std.clamp_min(1e-4 * float(std.max().clamp_min(1e-12)))  # a constant feature holds no information
    probe = AttentiveProbe(int(labels.max()) + 1, mean, scale, generator).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = -(-len(patches) // BATCH_SIZE)
    epochs = max(EPOCHS, -(-MIN_STEPS // steps_per_epoch))
    num_steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(epochs):
        for index in torch.randperm(len(patches), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(probe(patches[index].to(device).float()), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()
