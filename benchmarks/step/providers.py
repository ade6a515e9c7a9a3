"""Providers of a training step: this project, its reference and the official code, called alike over the same masks.

A provider is written

    project[:float32|:bfloat16][:eager|:compiled][:keep|:pointwise|:recompute][:xformers|:sdpa][:triton|:torch][:fp8]
           [:fused][:graphs][:autotune]
    reference[:float32|:bfloat16]
    official[:float32|:bfloat16]

`project` is `parallelize` (FSDP2) and `TrainStep`, as in a run. `keep`, `pointwise` and `recompute` say what the
backward pass computes again: nothing, norms and GELUs, or whole blocks. `fp8` is the precision of the teacher,
`fused` updates student and teacher with one kernel, `graphs`, with `fused`, replays steps as CUDA graphs, and
`autotune` times kernels for the products of the teacher's blocks, before the first step, and takes the fastest.
`reference` is `dmtjepa.reference.step` with autograd and PyTorch's AdamW, under autocast for bfloat16. `official` is
the official code (`benchmarks.official`); its images are normalized before the time is measured. All providers start
from the same weights. Workloads are described in benchmarks/workloads.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.official import OfficialStep, open_checkout
from benchmarks.workloads import Workload
from dmtjepa.config import Config
from dmtjepa.masks import MaskBatch
from dmtjepa.models.replace_method import replace_method
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.reference import step as reference
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import World
from dmtjepa.training.estimate import resolve_checkpointing
from dmtjepa.training.graphs import GraphedStep, uses_graphs
from dmtjepa.training.parallelize import build_mesh, parallelize
from dmtjepa.training.schedules import Schedules
from dmtjepa.training.step import TrainStep

PHASES = ("targets", "head", "predictions", "loss", "backward", "update", "teacher")

# Rates so high that three steps show whether student and teacher are updated.
SCHEDULES = Schedules(
    steps_per_epoch=1_000_000, num_epochs=1, warmup=0, start_lr=1e-3, lr=1e-3, final_lr=1e-6,
    weight_decay=0.04, final_weight_decay=0.4, ema=(0.9, 1.0),
)  # fmt: skip


# Properties of a provider, and the settings that they stand for.
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
    "fused": "runtime.fused_update=true",
    "graphs": "runtime.cuda_graphs='on'",
    "autotune": "runtime.autotune_teacher=true",
}


@dataclass(frozen=True)
class Provider:
    """One implementation of the step and its properties; see the description of this module."""

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
    """A provider from its text. The default is bfloat16 and compiled on CUDA, float32 and eager on a CPU."""
    code, *words = text.split(":")
    choices = [("float32", "bfloat16")] + [("eager", "compiled")] * (code == "project")
    known = PROPERTIES if code == "project" else choices[0]
    if code not in ("project", "reference", "official") or not set(words) <= set(known):
        raise SystemExit(f"provider {text!r}: write project, reference or official, then any of :{', :'.join(known)}")
    stated = [next((word for word in choice if word in words), choice[device == "cuda"]) for choice in choices]
    return Provider(code, (*stated, *(word for word in words if word not in stated)))


# ---- The providers


class ProjectStep:
    """This project's step as a run computes it. Needs a process group."""

    takes_pixels = False

    def __init__(self, workload: Workload, provider: Provider, world: World, on_phase: Callable[[str], None]) -> None:
        config = workload.config(*provider.settings)
        mesh = build_mesh(world.device.type, world.world_size)
        plan = ComputePlan.from_config(resolve_checkpointing(config, world.world_size, world.device), world.device.type)
        model = parallelize(draw_model(config, world.device), mesh, plan)
        fused = config.runtime.fused_update
        self.step = TrainStep(model, config.optimization, SCHEDULES, mesh, world.device, on_phase, fused=fused)
        self.optimizer = self.step.optimizer
        self.model = model
        if uses_graphs(config, world.world_size, world.device.type):
            self.step = GraphedStep(self.step)
        aggregate = model.teacher_head.aggregate_neighbors
        on_gpu = world.device.type == "cuda"

        def aggregate_in_phase(*arguments: object) -> Tensor:
            if not (on_gpu and torch.cuda.is_current_stream_capturing()):
                on_phase("head")
            return aggregate(*arguments)

        replace_method(model.teacher_head, "aggregate_neighbors", aggregate_in_phase)

    def __call__(self, images: Tensor, masks: MaskBatch, step: int) -> tuple[Tensor, Tensor]:
        return self.step([(images, masks)], step)

    def modules(self) -> list[nn.Module]:
        return [self.model]


class ReferenceStep:
    """`dmtjepa.reference.step` with plain autograd, AdamW and moving average.

    Args:
        micro_batch_size: images that are computed at a time. It does not change the result, and lets large batches fit.
    """

    takes_pixels = True

    def __init__(
        self,
        model: DMTJEPA,
        device: torch.device,
        on_phase: Callable[[str], None],
        dtype: torch.dtype,
        micro_batch_size: int,
    ) -> None:
        self.model, self.device, self.on_phase, self.dtype = model, device, on_phase, dtype
        self.micro_batch_size = micro_batch_size
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    def __call__(self, pixels: Tensor, masks: MaskBatch, step: int) -> tuple[Tensor, Tensor]:
        model, on_phase, total = self.model, self.on_phase, torch.zeros((), device=self.device)
        num_patches = model.encoder.grid_size[0] * model.encoder.grid_size[1]
        contexts = masks.context_index if masks.context_packing is None else masks.contexts(num_patches)
        for first in range(0, len(pixels), self.micro_batch_size):
            chosen = slice(first, first + self.micro_batch_size)
            images, context_index, target_index = pixels[chosen], contexts[chosen], masks.target_index[chosen]
            # The reference makes its tables on the default device.
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
            with self.device, autocast:
                on_phase("targets")  # with the head
                targets = reference.compute_targets(model, images, target_index)
                on_phase("predictions")
                predictions = reference.predict_targets(model, images, context_index, target_index)
                on_phase("loss")
                loss = F.smooth_l1_loss(predictions.float(), targets.float()) * (len(images) / len(pixels))
            on_phase("backward")
            loss.backward()
            total += loss.detach()
        on_phase("update")
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        for group, decay in zip(self.optimizer.param_groups, (SCHEDULES.decay(step), 0.0), strict=True):
            group["lr"], group["weight_decay"] = SCHEDULES.learning_rate(step), decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        on_phase("teacher")
        momentum = SCHEDULES.momentum(step)
        with torch.no_grad():
            pairs = ((model.teacher_encoder, model.encoder), (model.teacher_head, model.head))
            for average, new in (p for a, b in pairs for p in zip(a.parameters(), b.parameters(), strict=True)):
                average.mul_(momentum).add_(new, alpha=1 - momentum)
        return total, norm

    def modules(self) -> list[nn.Module]:
        return [self.model]


def draw_model(config: Config, device: torch.device) -> DMTJEPA:
    """The model that all providers start from: the same weights at each call."""
    torch.manual_seed(0)
    with device:
        return build_model(config, device.type)


def build_step(workload: Workload, provider: Provider, world: World, on_phase: Callable[[str], None]):
    if provider.code == "project":
        return ProjectStep(workload, provider, world, on_phase)
    model = draw_model(workload.config(), world.device)
    if provider.code == "reference":
        size = workload.batch_size if world.device.type == "cpu" else 64  # a larger one does not fit at ViT-H
        return ReferenceStep(model, world.device, on_phase, provider.dtype, size)
    return OfficialStep(
        model, workload.config(), SCHEDULES, world.device, on_phase, use_bfloat16=provider.dtype == torch.bfloat16
    )


def open_official(checkout: Path | None, providers: list[str]) -> None:
    """Make the official code importable; an error if a provider needs it and no checkout is given."""
    if checkout is not None:
        open_checkout(checkout)
    elif any(provider.startswith("official") for provider in providers):
        raise SystemExit("provider official: give a checkout of the official code with --official PATH")
