"""Estimate FLOPs, parameters and memory of a configuration before anything runs.

FLOPs count the multiplications and additions of matrix products, 2 for each product of two numbers. A backward pass
costs as much as two forward passes. FLOPs are per image, at the mean mask shapes of the configured sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dmtjepa.config import Config
from dmtjepa.devices import find_device
from dmtjepa.errors import UserError
from dmtjepa.masks import MaskSampler
from dmtjepa.models import ARCHITECTURES
from dmtjepa.objective import build_model
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.optimizer import UPDATED_BYTES
from dmtjepa.training.parallelize import UNIT_PARAMETERS
from dmtjepa.training.schedules import build_schedules

GIB = 2**30
USABLE = 0.95  # fraction of a GPU's memory; CUDA, NCCL and gaps of the allocator take the rest
ROOMY = 0.8  # fraction that a run may take by estimate to keep all activations; larger masks than the first may come


@dataclass(frozen=True)
class MaskShapes:
    """Numbers of patches per image: context C, target block T, unique targets U, neighbourhood R."""

    context: float
    target: float
    unique: float
    neighborhood: float


def measure_masks(config: Config, num_steps: int = 32) -> tuple[MaskShapes, MaskShapes]:
    """Return the mean and the largest shapes over the first steps of a run."""
    shapes = []
    batch = config.data.batch_size
    sampler = MaskSampler.from_config(config)
    for step in range(num_steps):
        masks = sampler.sample(step)
        sizes = masks.context_size, masks.target_index.shape[2]
        shapes.append((*sizes, len(masks.target_unique) / batch, len(masks.neighborhood) / batch))
    columns = list(zip(*shapes, strict=True))
    return MaskShapes(*(sum(column) / num_steps for column in columns)), MaskShapes(*map(max, columns))


def transformer_flops(num_patches: float, dim: int, depth: int, mlp_ratio: float) -> float:
    """Count the FLOPs of a forward pass through `depth` blocks of width D.

    Multiplications per patch and block: 4 D^2 in projections, 2 r D^2 in the MLP of ratio r, 2 L D in attention.
    """
    per_patch = 2 * (4 + 2 * mlp_ratio) * dim**2 + 4 * num_patches * dim
    return depth * num_patches * per_patch


def _predicted_patches(config: Config, shapes: MaskShapes) -> tuple[float, float, float]:
    """Patches per image that a sequence of the predictor predicts, that have targets, and that these are made from."""
    if not config.optimization.context_loss:
        return shapes.target, shapes.unique, shapes.neighborhood
    return shapes.context + shapes.target, shapes.unique + shapes.context, config.grid_size[0] * config.grid_size[1]


def step_flops(config: Config, shapes: MaskShapes) -> dict[str, float]:
    """Count the FLOPs per image of each part of a training step at the given mask shapes."""
    architecture = ARCHITECTURES[config.meta.model_name]
    dim, depth = architecture["embed_dim"], architecture["depth"]
    heads, ratio = architecture["num_heads"], architecture["mlp_ratio"]
    num_patches = config.grid_size[0] * config.grid_size[1]
    pixels = config.data.channels * config.mask.patch_size**2
    narrow, blocks = config.meta.pred_emb_dim, config.mask.num_pred_masks
    predicted, unique, neighborhood = _predicted_patches(config, shapes)

    def encoder(count: float) -> float:
        return transformer_flops(count, dim, depth, ratio) + 2 * count * pixels * dim

    sequence = shapes.context + shapes.target
    predictor = blocks * transformer_flops(sequence, narrow, config.meta.pred_depth - 1, 4.0)
    # The last block computes keys and values of all patches, and everything else of those that are predicted.
    predictor += blocks * narrow * (4 * narrow * sequence + predicted * (20 * narrow + 4 * sequence))
    predictor += 2 * dim * narrow * (shapes.context + blocks * predicted)
    flops = {
        "teacher encoder": encoder(num_patches),
        "context encoder": 3 * encoder(shapes.context),
        "predictor": 3 * predictor,
    }
    if config.patch.local_agg_head:
        # First block: values of the neighbourhood, scores of all patches. Second: keys, values and queries.
        per_target = 2 * (2 * 1 + 2 * 8 + 3)  # two output maps, two MLPs, query and own key and value
        if config.patch.query == "patch":  # both blocks compute as the second
            head = ((per_target + 6) * unique + 8 * neighborhood) * dim**2
        else:
            head = (per_target * unique + 6 * neighborhood) * dim**2 + 2 * num_patches * heads * dim
        flops["target head"] = head
        # Single-query attention: scores and pooling over LN1(z) per head. The MLPs dominate.
        flops["context head"] = 3 * 2 * shapes.context * (2 * 8 * dim**2 + 4 * heads * dim)
    return flops


def count_parameters(config: Config) -> dict[str, int]:
    """Count the parameters of each module of the model, without allocating them."""
    with torch.device("meta"):
        model = build_model(config)
    return {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_children()
        if module is not None
    }


def memory_bytes(config: Config, shapes: MaskShapes, world_size: int, on_cuda: bool) -> dict[str, float]:
    """Estimate the peak memory of a device in bytes, by use.

    Weights, gradients and AdamW's averages are float32 and sharded. See `ComputePlan` for what the backward pass keeps.

    Args:
        config: settings of the run.
        shapes: the largest mask shapes that occur.
        world_size: number of processes.
        on_cuda: whether the device is a GPU.
    """
    architecture = ARCHITECTURES[config.meta.model_name]
    dim, depth = architecture["embed_dim"], architecture["depth"]
    runtime, batch = config.runtime, config.data.batch_size
    parameters = count_parameters(config)
    student = sum(count for name, count in parameters.items() if not name.startswith("teacher"))
    teacher = sum(parameters.values()) - student
    device_type = "cuda" if on_cuda else "cpu"
    plan = ComputePlan.from_config(config, device_type)
    size = plan.dtype.itemsize
    kept = {"none": 16.0, "pointwise": 10.0, "blocks": 1.0}[plan.recompute]
    # Of the numbers that a block keeps, those of the residual stream: its inputs to both norms, or its input alone.
    wider = 4 / size - 1 if runtime.residual == "float32" else 0.0
    kept += wider * (1 if plan.recompute == "blocks" else 2)
    shards = min(runtime.shard_size or world_size, world_size)
    num_patches = config.grid_size[0] * config.grid_size[1]
    one_block = parameters["encoder"] / depth
    one_unit = min(parameters["encoder"], one_block * math.ceil(UNIT_PARAMETERS / one_block)) if on_cuda else one_block
    gathered = 2 * one_unit if plan.reshard_after_forward and not (on_cuda and shards == 1) else student

    if runtime.fused_update and shards == 1:
        gathered = student + teacher

    activations = batch * shapes.context * depth * kept * dim
    sequence = shapes.context + shapes.target
    predicted, unique, _ = _predicted_patches(config, shapes)
    activations += (
        batch * config.mask.num_pred_masks * sequence * config.meta.pred_depth * kept * config.meta.pred_emb_dim
    )
    if config.patch.local_agg_head:
        activations += batch * shapes.context * 2 * 14 * dim
    uses = {
        "student, gradients, AdamW": 16 * student / shards,
        "teacher": 4 * teacher / shards,
        "copies for update norms": min(4 * student / shards, UPDATED_BYTES),
        "gathered weights": size * gathered,
        "saved activations": size * activations,
        "teacher's forward pass": size * batch * num_patches * (12 + 2 * wider) * dim,
        "predictions and targets": 4 * batch * (config.mask.num_pred_masks * predicted * 3 + unique * 8) * dim,
    }
    if runtime.cuda_graphs == "on" and on_cuda:
        # Their pool holds what a step needs beside the weights, and so does the memory of steps that are not replayed.
        passing = ("saved activations", "teacher's forward pass", "predictions and targets")
        uses["CUDA graphs"] = 4 * student + sum(uses[name] for name in passing)
    return uses


class OutOfMemory(UserError, RuntimeError):
    """A step did not fit into the memory of its device. The message names settings that should fit."""


def _changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def resolve_checkpointing(config: Config, world_size: int, device: torch.device) -> Config:
    """Replace `activation_checkpointing: auto` by `none` where, by estimate, everything fits into the memory of a GPU.

    Returns:
        The changed settings, or `config` itself: on a CPU, for other settings, and where not everything fits.
    """
    if device.type != "cuda" or config.runtime.activation_checkpointing != "auto":
        return config
    kept = _changed(config, "runtime", activation_checkpointing="none")
    _, largest = measure_masks(config)
    needed = sum(memory_bytes(kept, largest, world_size, on_cuda=True).values())
    return kept if needed <= ROOMY * torch.cuda.get_device_properties(device).total_memory else config


def largest_batch(config: Config, shapes: MaskShapes, world_size: int, capacity: float) -> int:
    """Estimate how many images per device fit into `capacity` bytes of a GPU; 0 if not even one does."""
    one, two = (
        sum(memory_bytes(_changed(config, "data", batch_size=batch), shapes, world_size, on_cuda=True).values())
        for batch in (1, 2)
    )
    return max(0, int(1 + (capacity - one) / (two - one)))


def explain_oom(config: Config, world_size: int, device: torch.device, error: torch.OutOfMemoryError) -> str:
    """Describe an out-of-memory error and suggest settings that should fit."""
    config = resolve_checkpointing(config, world_size, device)
    total = torch.cuda.get_device_properties(device).total_memory
    _, largest = measure_masks(config)
    needed = sum(memory_bytes(config, largest, world_size, on_cuda=True).values())
    text = (
        f"{device} with {total / GIB:.1f} GiB has no memory for data.batch_size {config.data.batch_size} "
        f"(estimated need: {needed / GIB:.1f} GiB; {str(error).splitlines()[0].rstrip('.')}). "
    )
    if needed < USABLE * total:
        text += "By estimate it should fit: does another process use this GPU (nvidia-smi)? "
    choices = []
    for how in ("pointwise", "blocks"):
        changed = _changed(config, "runtime", activation_checkpointing=how)
        batch = min(largest_batch(changed, largest, world_size, USABLE * total), config.data.batch_size)
        if batch > 0 and (how, batch) != (ComputePlan.from_config(config, "cuda").recompute, config.data.batch_size):
            choices.append(f"runtime.activation_checkpointing={how} data.batch_size={batch}")
    if choices:
        text += f"By estimate these fit: {'; or '.join(choices)}. "
    if config.measures_start or config.evaluation.every_epochs:
        text += "Evaluation during training takes memory, too (evaluation.measure_start, evaluation.every_epochs). "
    return text + "Raise runtime.accumulation to keep the global batch with a lower data.batch_size."


def describe(config: Config, world_size: int, device: str) -> str:
    """Return the text of `--dry-run`."""
    on_cuda = device.startswith("cuda")
    mean, largest = measure_masks(config)
    flops, parameters = step_flops(config, mean), count_parameters(config)
    resolved = config
    if here := find_device(device):  # a login node may have no GPU
        resolved = resolve_checkpointing(config, world_size, here)
    memory = memory_bytes(resolved, largest, world_size, on_cuda)
    recompute = ComputePlan.from_config(resolved, "cuda" if on_cuda else "cpu").recompute
    global_batch = config.global_batch(world_size)
    schedules = build_schedules(config.optimization, 1, global_batch)
    width = max(map(len, [*flops, *parameters, *memory]))

    def table(values: Mapping[str, float], unit: str, scale: float) -> list[str]:
        values = dict(values) | {"total": sum(values.values())}
        return [f"  {name:{width}} {value / scale:10.2f} {unit}" for name, value in values.items()]

    meant_for = config.optimization.lr_batch_size
    lines = [
        config.to_yaml().rstrip(),
        "",
        f"processes          {world_size} ({device.partition(':')[0]})",
        f"effective batch    {global_batch} = {config.data.batch_size} x {world_size} processes x "
        f"{config.runtime.accumulation} accumulated",
        f"learning rate      {schedules.start_lr:g} to {schedules.lr:g} to {schedules.final_lr:g}"
        + (f" (scaled from a batch of {meant_for})" if meant_for else ""),
        f"patches per image  {config.grid_size[0]}x{config.grid_size[1]}; context {mean.context:.1f} "
        f"(at most {largest.context:g}), target block {mean.target:.1f}, covered {mean.unique:.1f}, "
        f"with neighbours {mean.neighborhood:.1f}",
        "parameters",
        *table(parameters, "M", 1e6),
        "FLOPs per image (predicted, at the mean mask shapes)",
        *table(flops, "GFLOP", 1e9),
        f"memory of a device (estimate, at the largest mask shapes, with activation_checkpointing {recompute})",
        *table(memory, "GiB", GIB),
    ]
    return "\n".join(lines)
