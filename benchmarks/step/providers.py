"""Whole training steps of several providers, alike to call, over the same masks.

A workload is a model at a batch. Its images are one batch of random pixels; its masks are those that the trainer would
sample at steps 0, 1, 2, ... of seed 0, so that a recording of masks is a number of steps. A provider is written

    project[:float32|:bfloat16][:eager|:compiled][:keep|:pointwise|:recompute][:xformers|:sdpa][:triton|:torch][:fp8]
    reference[:float32|:bfloat16]
    published[:float32|:bfloat16]

`project` is `parallelize` (FSDP2) and `TrainStep`, as in a run; `keep`, `pointwise` and `recompute` are what the
backward pass computes again (nothing, norms and GELUs, or whole blocks), `fp8` is the teacher's precision. `reference`
is `dmtjepa.reference.step` with autograd and PyTorch's AdamW, under autocast for bfloat16. `published` is the published
code (`benchmarks.official`), which gets its images normalised, outside of what is timed. All start from the same
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.official import PublishedStep, open_checkout
from dmtjepa.config import Config, ConfigError, load_config
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.reference import step as reference
from dmtjepa.training.distributed import World
from dmtjepa.training.estimate import MaskShapes, step_flops
from dmtjepa.training.parallelize import build_mesh, parallelize, recomputation
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.step import TrainStep

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = {"vit_large": "in1k_vitl16_ep600", "vit_huge": "in1k_vith14_ep300", "vit_giant": "in22k_vitg16_ep44"}
OTHER_MODELS = "in1k_vitb16_ep600"
PHASES = ("targets", "head", "predictions", "loss", "backward", "update", "teacher")

# Of every step: rates at which three steps show whether student and teacher are updated.
SCHEDULES = Schedules(
    steps_per_epoch=1_000_000, num_epochs=1, warmup=0, start_lr=1e-3, lr=1e-3, final_lr=1e-6,
    weight_decay=0.04, final_weight_decay=0.4, ema=(0.9, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A model, as settings call its encoder, at a batch per device; `overrides` of settings, e.g. data.crop_size=96."""

    model: str
    batch_size: int
    overrides: tuple[str, ...] = ()

    @cache  # noqa: B019  a few workloads live as long as the program
    def config(self, *overrides: str) -> Config:
        """The settings of the published run of this model (of ViT-B/16's for others), at this batch."""
        changes = [f"meta.model_name={self.model}", f"data.batch_size={self.batch_size}", *self.overrides]
        return load_config(CONFIGS / f"{RUNS.get(self.model, OTHER_MODELS)}.yaml", [*changes, *overrides])

    @property
    def name(self) -> str:
        return f"{self.model.replace('vit_', 'ViT-')}/{self.config().mask.patch_size} B={self.batch_size}"

    @cache  # noqa: B019
    def masks(self, step: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> MaskBatch:
        return MaskSampler.from_config(self.config(), seed=0).sample(step, rank, world_size).to(device)

    def images(self, device: torch.device, rank: int = 0) -> Tensor:
        """uint8 [B, 3, H, W], the same at every step."""
        size = (self.batch_size, 3, *self.config().data.image_size)
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8, device="cpu").to(device)

    def mask_shapes(self, step: int) -> MaskShapes:
        masks = self.masks(step)
        per_image = (len(masks.target_unique) / self.batch_size, len(masks.neighborhood) / self.batch_size)
        return MaskShapes(masks.context_size, masks.target_index.shape[2], *per_image)

    def flops(self, step: int) -> float:
        """Lean FLOPs of a step, at the shapes of its masks (`dmtjepa.training.estimate`)."""
        return self.batch_size * sum(step_flops(self.config(), self.mask_shapes(step)).values())


def parse_workload(text: str, overrides: Iterable[str] = ()) -> Workload:
    """`vit_huge:128`: a model and its images per device."""
    model, _, batch = text.partition(":")
    if not batch.isdigit():
        raise SystemExit(f"model {text!r}: write it as model:batch, e.g. vit_huge:128")
    workload = Workload(model, int(batch), tuple(overrides))
    try:
        workload.config()
    except ConfigError as error:
        raise SystemExit(f"ConfigError: {error}") from None
    return workload


# Properties of a provider, and the settings of a run that they stand for.
PROPERTIES = {
    "float32": "runtime.precision=float32",
    "bfloat16": "runtime.precision=bfloat16",
    "eager": "runtime.compile='off'",
    "compiled": "runtime.compile='on'",
    "keep": "runtime.activation_checkpointing=none",
    "pointwise": "runtime.activation_checkpointing=pointwise",
    "recompute": "runtime.activation_checkpointing=blocks",
    "xformers": "runtime.attention=xformers",
    "sdpa": "runtime.attention=sdpa",
    "triton": "runtime.kernels=triton",
    "torch": "runtime.kernels=torch",
    "fp8": "runtime.teacher_precision=fp8",
}


@dataclass(frozen=True)
class Provider:
    """One implementation of the step, and how it is run; see this module's description."""

    code: str
    properties: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((self.code, *self.properties))

    @property
    def settings(self) -> list[str]:
        return [PROPERTIES[word] for word in self.properties]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if "bfloat16" in self.properties else torch.float32

    @property
    def rounding(self) -> str:
        """The coarsest format that it computes in: float32, bfloat16 or fp8."""
        return next(name for name in ("fp8", "bfloat16", "float32") if name in self.properties)


def parse_provider(text: str, device: str) -> Provider:
    """A provider from its text. What is not said is bfloat16 and compiled on CUDA, float32 and eager on a CPU."""
    code, *words = text.split(":")
    choices = [("float32", "bfloat16")] + [("eager", "compiled")] * (code == "project")
    known = PROPERTIES if code == "project" else choices[0]
    if code not in ("project", "reference", "published") or not set(words) <= set(known):
        raise SystemExit(f"provider {text!r}: write project, reference or published, then any of :{', :'.join(known)}")
    stated = [next((word for word in choice if word in words), choice[device == "cuda"]) for choice in choices]
    return Provider(code, (*stated, *(word for word in words if word not in stated)))


# ---- The providers


class ProjectStep:
    """This project's step as a run computes it. Needs a process group."""

    takes_pixels = False

    def __init__(self, workload: Workload, provider: Provider, world: World, at: Callable[[str], None]) -> None:
        config = workload.config(*provider.settings)
        mesh = build_mesh(world.device.type, world.world_size)
        model = parallelize(
            draw_model(config, world.device),
            mesh,
            dtype=provider.dtype,
            compiled=config.runtime.compile == "on",
            recompute=recomputation(config, world.device.type),
        )
        self.step = TrainStep(model, config.optimization, SCHEDULES, mesh, world.device, at)
        aggregate = model.teacher_head.aggregate_neighbors

        def announced(*arguments: object) -> Tensor:
            at("head")
            return aggregate(*arguments)

        model.teacher_head.aggregate_neighbors = announced
        self.optimizer = self.step.optimizer

    def __call__(self, images: Tensor, masks: MaskBatch, step: int) -> tuple[Tensor, Tensor]:
        return self.step([(images, masks)], step)

    def modules(self) -> list[nn.Module]:
        return [self.step.model]


class ReferenceStep:
    """`dmtjepa.reference.step`, with autograd, AdamW and the moving average by PyTorch's plain means.

    Args:
        part: images that are computed at a time, for machines that cannot hold a batch; the result is the same.
    """

    takes_pixels = True

    def __init__(
        self, model: DMTJEPA, device: torch.device, at: Callable[[str], None], dtype: torch.dtype, part: int
    ) -> None:
        self.model, self.device, self.at, self.dtype, self.part = model, device, at, dtype, part
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    def __call__(self, pixels: Tensor, masks: MaskBatch, step: int) -> tuple[Tensor, Tensor]:
        model, at, total = self.model, self.at, torch.zeros((), device=self.device)
        num_patches = model.encoder.grid_size[0] * model.encoder.grid_size[1]
        contexts = masks.context_index if masks.context_packing is None else masks.contexts(num_patches)
        for first in range(0, len(pixels), self.part):
            part = slice(first, first + self.part)
            images, context_index, target_index = pixels[part], contexts[part], masks.target_index[part]
            # The reference makes its tables wherever the default device is.
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
            with self.device, autocast:
                at("targets")  # with the head
                targets = reference.compute_targets(model, images, target_index)
                at("predictions")
                predictions = reference.predict_targets(model, images, context_index, target_index)
                at("loss")
                loss = F.smooth_l1_loss(predictions.float(), targets.float()) * (len(images) / len(pixels))
            at("backward")
            loss.backward()
            total += loss.detach()
        at("update")
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        for group, decay in zip(self.optimizer.param_groups, (SCHEDULES.decay(step), 0.0), strict=True):
            group["lr"], group["weight_decay"] = SCHEDULES.learning_rate(step), decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        at("teacher")
        momentum = SCHEDULES.momentum(step)
        with torch.no_grad():
            pairs = ((model.teacher_encoder, model.encoder), (model.teacher_head, model.head))
            for average, new in (p for a, b in pairs for p in zip(a.parameters(), b.parameters(), strict=True)):
                average.mul_(momentum).add_(new, alpha=1 - momentum)
        return total, norm

    def modules(self) -> list[nn.Module]:
        return [self.model]


def draw_model(config: Config, device: torch.device) -> DMTJEPA:
    """The model all providers start from: the same weights at each call."""
    torch.manual_seed(0)
    with device:
        return build_model(config, device.type)


def build_step(workload: Workload, provider: Provider, world: World, at: Callable[[str], None]):
    if provider.code == "project":
        return ProjectStep(workload, provider, world, at)
    model = draw_model(workload.config(), world.device)
    if provider.code == "reference":
        part = workload.batch_size if world.device.type == "cpu" else 64  # more would not fit at ViT-H
        return ReferenceStep(model, world.device, at, provider.dtype, part)
    return PublishedStep(
        model, workload.config(), SCHEDULES, world.device, at, use_bfloat16=provider.dtype == torch.bfloat16
    )


def open_published(checkout: Path | None, providers: list[str]) -> None:
    """Prepare the published code; an error where a provider needs it and no checkout is named."""
    if checkout is not None:
        open_checkout(checkout.resolve())
    elif any(provider.startswith("published") for provider in providers):
        raise SystemExit("provider published: name a checkout of it with --published PATH")
