"""Small models, masks and images on which the objective is compared with its reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.models import AggregationHead, Predictor, VisionTransformer
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.schedules import Schedules

PATCH = 4
SCHEDULES = Schedules(
    steps_per_epoch=10, num_epochs=1, warmup=0, start_lr=1e-3, lr=1e-3, final_lr=1e-4,
    weight_decay=0.04, final_weight_decay=0.4, ema=(0.9, 1.0),
)  # fmt: skip


class Case(NamedTuple):
    batch: int
    grid: tuple[int, int]
    num_neighbors: int
    window: int
    border: str
    head: bool = True
    embed_dim: int = 32
    num_heads: int = 4
    min_keep: int = 2
    query: str = "image"
    channels: int = 3
    context_loss: float = 0.0

    def __str__(self):
        size = f"B{self.batch}-{self.grid[0]}x{self.grid[1]}"
        rest = "" if self.head else "-ijepa"
        rest += "" if self.query == "image" else f"-{self.query}"
        rest += "" if self.channels == 3 else f"-{self.channels}channels"
        rest += f"-context{self.context_loss}" if self.context_loss else ""
        return f"{size}-k{self.num_neighbors}-w{self.window}-{self.border}{rest}"


def make_model(case: Case, dtype: torch.dtype, seed: int = 0) -> DMTJEPA:
    """A model in which nothing is at its initial value, so that no bias, norm or difference of weights can hide."""
    torch.manual_seed(seed)
    size = (case.grid[0] * PATCH, case.grid[1] * PATCH)
    encoder = VisionTransformer(
        size, PATCH, case.embed_dim, depth=2, num_heads=case.num_heads, num_channels=case.channels
    )
    predictor = Predictor(case.grid, case.embed_dim, predictor_dim=16, depth=2, num_heads=2)
    head = None
    if case.head:
        neighbors = case.num_neighbors, case.window, case.border
        head = AggregationHead(case.embed_dim, case.num_heads, *neighbors, case.query)
    model = DMTJEPA(encoder, predictor, head, context_loss_weight=case.context_loss).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_masks(case: Case, step: int = 0) -> MaskBatch:
    settings = MaskSettings(patch_size=PATCH, min_keep=case.min_keep)
    return MaskSampler(settings, case.grid, case.batch, 1, case.window, case.border).sample(step)


def packed_masks(case: Case, step: int = 0, **settings) -> MaskBatch:
    settings = MaskSettings(patch_size=PATCH, min_keep=case.min_keep, pack=True, **settings)
    return MaskSampler(settings, case.grid, case.batch, seed=1, border=case.border).sample(step)


def make_images(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Normalised images; smooth, so that neighbouring patches resemble each other."""
    noise = torch.randn(case.batch, case.channels, case.grid[0], case.grid[1], dtype=torch.float64)
    images = F.interpolate(noise, scale_factor=PATCH, mode="bilinear") + 0.3 * torch.randn(
        case.batch, case.channels, case.grid[0] * PATCH, case.grid[1] * PATCH, dtype=torch.float64
    )
    return images.to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def student_gradients(model: DMTJEPA) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
