"""How a model is spread over devices: activation checkpointing, then torch.compile, then FSDP2; in this order, here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dmtjepa.config import Config, ConfigError
from dmtjepa.objective import DMTJEPA


def compute_dtype(config: Config, device_type: str) -> torch.dtype:
    """What blocks compute in on a device, `cuda` or `cpu` (`runtime.precision`)."""
    if config.runtime.precision != "auto":
        return getattr(torch, config.runtime.precision)
    return torch.bfloat16 if device_type == "cuda" and config.meta.use_bfloat16 else torch.float32


def recomputation(config: Config, device_type: str) -> str:
    """What a run computes again in the backward pass: `none`, `pointwise` (norms and GELUs) or `blocks`.

    A block of width D keeps about 16 D numbers per patch for the backward pass; 10 D; or D.
    """
    if config.runtime.activation_checkpointing != "auto":
        return config.runtime.activation_checkpointing
    return "pointwise" if is_compiled(config, device_type) else "none"


def is_compiled(config: Config, device_type: str) -> bool:
    """Whether blocks are compiled on a device (`runtime.compile`)."""
    return config.runtime.compile == "on" or (config.runtime.compile == "auto" and device_type == "cuda")


def build_mesh(
    device_type: str, world_size: int, shard_size: int | None = None, timeout: timedelta | None = None
) -> DeviceMesh:
    """One dimension, over which the model is sharded (FSDP); or [copies, shards] (HSDP) for a smaller `shard_size`.

    Args:
        timeout: of collectives, for groups that are not the group of all processes; None: PyTorch's (NCCL: 10 minutes).
    """
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    if world_size % shard_size:
        raise ConfigError(f"runtime.shard_size: {world_size} processes cannot be divided into groups of {shard_size}")
    mesh = init_device_mesh(device_type, (world_size // shard_size, shard_size), mesh_dim_names=("copy", "shard"))
    if timeout is not None:
        for group in mesh.get_all_groups():
            _set_pg_timeout(timeout, group)
    return mesh


def parallelize(
    model: DMTJEPA,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    compiled: bool = False,
    recompute: str = "none",
    reshard_after_forward: bool = True,
) -> DMTJEPA:
    """Spread student and teacher over `mesh`, in place. Weights, gradients and their reduction are float32.

    Args:
        dtype: of the computation; blocks see their weights in it.
        compiled: see `compile_blocks`.
        recompute: what the backward pass computes again of the blocks of encoder and predictor, see `recomputation`.
        reshard_after_forward: whether the student's blocks are gathered again for the backward pass.
    """
    student, _, heads = _parts(model)
    if recompute == "blocks" or not compiled:
        checkpoint_blocks(student, recompute)
    set_memory_budget(recompute)
    if compiled:
        compile_blocks(model)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    teacher, encoder, predictor = (
        gathered_together(blocks, mesh)
        for blocks in (model.teacher_encoder.blocks, model.encoder.blocks, model.predictor.predictor_blocks)
    )
    for unit in [*teacher, model.teacher_encoder, *heads[:1]]:
        shard(unit, reshard_after_forward=True)  # no backward pass will need it
    # Where blocks are no units, what they are part of is gathered as long as they need it anyway.
    reshard_after_forward = reshard_after_forward and bool(encoder)
    for unit in [*encoder, *predictor, model.encoder, model.predictor, *heads[1:]]:
        shard(unit, reshard_after_forward=reshard_after_forward)
    shard(model, reshard_after_forward=False)
    for module, method in [(model, "compute_targets"), (model, "predict_targets")]:
        register_fsdp_forward_method(module, method)
    for head in heads:
        register_fsdp_forward_method(head, "aggregate_context")
        register_fsdp_forward_method(head, "aggregate_neighbors")
    if mesh["shard"].size() == 1:
        cast_at_once(model)
    # Gather the next unit's weights while this one computes. A unit of several blocks goes by its first.
    teacher, encoder, predictor = ([unit[0] for unit in units] for units in (teacher, encoder, predictor))
    forward = [model.teacher_encoder, *teacher, *heads[:1], model.encoder, *encoder, *heads[1:]]
    for current, following in itertools.pairwise([*forward, model.predictor, *predictor]):
        current.set_modules_to_forward_prefetch([following])
    backward = [model.predictor, *predictor[::-1], *heads[1:], model.encoder, *encoder[::-1]]
    for current, following in itertools.pairwise(backward):
        current.set_modules_to_backward_prefetch([following])
    return model


# Parameters that a GPU gathers at a time, at least: 100 MB in bfloat16 keep a link between nodes busy for 2 ms.
UNIT_PARAMETERS = 32e6


def gathered_together(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> list[list[nn.Module]]:
    """The blocks whose weights are cast and gathered at a time.

    Each unit costs the host about a millisecond a step (docs/performance.md), so that on a GPU there are few: of at
    least UNIT_PARAMETERS where weights come from other ranks; none on a GPU by itself, where units of their own would
    save it a part of the weights in bfloat16 and no more. A CPU is slow enough for each block to be one.
    """
    if mesh.device_type != "cpu" and mesh["shard"].size() == 1:
        return []
    least = 0 if mesh.device_type == "cpu" else UNIT_PARAMETERS
    units: list[list[nn.Module]] = []
    for block in blocks:
        if not units or sum(p.numel() for b in units[-1] for p in b.parameters()) >= least:
            units.append([])
        units[-1].append(block)
    return units


def cast_at_once(model: nn.Module) -> None:
    """Let each unit of a model that is not sharded get its weights by one call, in place.

    FSDP2 does it parameter by parameter there: a cast, a copy of the result, and their launches, 800 of the 2000 of a
    step of ViT-B/16 (docs/performance.md). Several processes have it better: they copy in and out all at once. This
    replaces a method of PyTorch's own classes, so only that of the version it was written for; another keeps its own.
    """
    if not torch.__version__.startswith("2.11."):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group.wait_for_unshard = functools.partial(_cast_weights, group)


def _cast_weights(group) -> None:
    """`FSDPParamGroup.wait_for_unshard` where a process has all weights. The marker that `unshard` leaves is taken."""
    if group._all_gather_result is None:  # they are there already
        return
    weights = [parameter._sharded_param_data for parameter in group.fsdp_params]
    for parameter, weight in zip(group.fsdp_params, weights, strict=True):
        dtype = parameter.param_dtype or weight.dtype
        parameter.init_all_gather_outputs([weight.numel()], [dtype], 1, group.device)
        parameter.alloc_all_gather_outputs()
    outputs = tuple(parameter.all_gather_outputs[0] for parameter in group.fsdp_params)
    # The backward pass may have kept these tensors: in it they are filled again with what they held.
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(outputs):
        torch._foreach_copy_(outputs, weights)
    for parameter in group.fsdp_params:
        parameter.init_unsharded_param()
    group._to_unsharded()
    group._all_gather_result = None


# Operators whose outputs are kept where pointwise ones are computed again.
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
) | {torch.ops.dmtjepa.onednn_linear.default}


def checkpoint_blocks(blocks: Sequence[nn.Module], recompute: str) -> None:
    """Make the backward pass of `blocks` compute again what `recompute` says, see `recomputation`."""
    if recompute == "none":
        return
    contexts = {"context_fn": _keep_products} if recompute == "pointwise" else {}
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def _keep_products():
    def choose(_context, operator, *_arguments, **_keywords) -> CheckpointPolicy:
        # xFormers' operators exist once a model is built with them.
        kept = operator in _PRODUCTS or operator.name() == "xformers_flash::flash_fwd"
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


def set_memory_budget(recompute: str) -> None:
    """The same of blocks that will be compiled, where it is for the partitioner of their graphs to decide.

    At a budget of 1 it keeps what a backward pass without recomputation would. Anything less first gives up what is no
    product of matrices, and that is enough for 0.9.
    """
    torch._functorch.config.activation_memory_budget = 0.9 if recompute == "pointwise" else 1.0


def compile_blocks(model: DMTJEPA, compiler: Callable[..., Callable] = torch.compile) -> None:
    """Compile each block and the heads, without graph breaks. The number of patches is symbolic where it varies."""
    student, teacher, heads = _parts(model)
    for block in student:
        block.forward = _compile_varying(block.forward, compiler)
    for block in teacher:
        block.forward = compiler(block.forward, fullgraph=True, dynamic=False)
    for head in heads[:1]:
        head.aggregate_neighbors = _compile_varying(head.aggregate_neighbors, compiler)
    for head in heads[1:]:
        head.aggregate_context = _compile_varying(head.aggregate_context, compiler)


def _parts(model: DMTJEPA) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Blocks of the student, blocks of the teacher, and the heads of teacher and student (none in plain I-JEPA)."""
    heads = [] if model.head is None else [model.teacher_head, model.head]
    return [*model.encoder.blocks, *model.predictor.predictor_blocks], [*model.teacher_encoder.blocks], heads


def _compile_varying(function: Callable[..., Tensor], compiler: Callable[..., Callable]) -> Callable[..., Tensor]:
    """`function` compiled for any number of patches: dimension 1 of a batch [B, L, ...], dimension 0 of a list."""
    compiled = compiler(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def run(*arguments: Tensor | tuple | None) -> Tensor:
        mark_varying(arguments)
        return compiled(*arguments)

    def mark_varying(value: Tensor | tuple | int | None) -> None:
        if isinstance(value, Tensor):
            torch._dynamo.maybe_mark_dynamic(value, 1 if value.ndim > 1 else 0)
        elif isinstance(value, tuple):
            for part in value:
                mark_varying(part)

    return run
