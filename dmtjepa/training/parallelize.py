"""How a model is distributed over devices.

The order of the wrappers is decided here and nowhere else: activation checkpointing, then `torch.compile`, then FSDP2.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dmtjepa.config import ConfigError
from dmtjepa.models.replace_method import replace_method
from dmtjepa.objective import DMTJEPA
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import set_timeout

Compiler = Callable[..., Callable[..., Any]]  # such as torch.compile

logger = logging.getLogger(__name__)

# A unit of blocks on several GPUs has at least this many parameters: their 64 MB in bfloat16 keep a link between nodes
# busy for 1 to 2 ms.
UNIT_PARAMETERS = 32e6


def check_shard_size(world_size: int, shard_size: int | None) -> None:
    """Check that groups of `shard_size` divide the processes.

    Raises:
        ConfigError: `world_size` is not a multiple of `shard_size`.
    """
    if shard_size is not None and world_size % shard_size:
        raise ConfigError(f"runtime.shard_size: {world_size} processes cannot be divided into groups of {shard_size}")


def build_mesh(
    device_type: str, world_size: int, shard_size: int | None = None, timeout: timedelta | None = None
) -> DeviceMesh:
    """Build the mesh: [shards] for FSDP, or [copies, shards] for HSDP with a `shard_size` below `world_size`.

    Args:
        timeout: timeout of collectives in the process groups that this function creates; None keeps PyTorch's.

    Raises:
        ConfigError: `world_size` is not a multiple of `shard_size`.
    """
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    check_shard_size(world_size, shard_size)
    mesh = init_device_mesh(device_type, (world_size // shard_size, shard_size), mesh_dim_names=("copy", "shard"))
    if timeout is not None:
        for group in mesh.get_all_groups():
            set_timeout(timeout, group)
    return mesh


@dataclass(frozen=True)
class FsdpUnits:
    """A module of the model and those of its blocks that are gathered separately from it.

    Each element of `blocks` is a unit: consecutive blocks whose weights are gathered together.
    """

    module: nn.Module
    blocks: list[list[nn.Module]]

    @property
    def forward_order(self) -> list[nn.Module]:
        """The modules before which the forward pass gathers weights. The first block stands for its unit."""
        return [self.module, *(unit[0] for unit in self.blocks)]

    @property
    def backward_order(self) -> list[nn.Module]:
        """The same for the backward pass."""
        return [self.module, *(unit[0] for unit in self.blocks[::-1])]

    def shard(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, reshard_after_forward: bool) -> None:
        """Apply `fully_shard` to blocks and module, inner modules first."""
        for unit in self.blocks:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        fully_shard(self.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def parallelize(model: DMTJEPA, mesh: DeviceMesh, plan: ComputePlan) -> DMTJEPA:
    """Distribute student and teacher over `mesh`, in place. Weights, gradients and their reduction are float32."""
    if plan.recompute == "blocks" or not plan.compiled:
        checkpoint_blocks(student_blocks(model), plan.recompute)
    set_memory_budget(plan.recompute)
    if plan.compiled:
        from dmtjepa.training.inductor import configure_inductor  # takes a second to import

        configure_inductor()
        compile_blocks(model, autotune_teacher=plan.autotune_teacher)
    elif plan.autotune_teacher:
        logger.info("runtime.autotune_teacher has no effect: blocks are not compiled (runtime.compile)")
    teacher, student = teacher_units(model, mesh), student_units(model, mesh)
    shard_units(model, teacher, student, mesh, plan)
    register_forward_methods(model)
    if mesh["shard"].size() == 1:
        cast_at_once(model, keep=plan.keep_copies)
    prefetch(teacher, student)
    return model


def student_blocks(model: DMTJEPA) -> list[nn.Module]:
    """The transformer blocks of the student."""
    return [*model.encoder.blocks, *model.predictor.predictor_blocks]


def teacher_units(model: DMTJEPA, mesh: DeviceMesh) -> list[FsdpUnits]:
    """The units of the teacher in the order of the forward pass."""
    units = [FsdpUnits(model.teacher_encoder, group_fsdp_units(model.teacher_encoder.blocks, mesh))]
    return units if model.teacher_head is None else [*units, FsdpUnits(model.teacher_head, [])]


def student_units(model: DMTJEPA, mesh: DeviceMesh) -> list[FsdpUnits]:
    """The units of the student in the order of the forward pass."""
    encoder = FsdpUnits(model.encoder, group_fsdp_units(model.encoder.blocks, mesh))
    predictor = FsdpUnits(model.predictor, group_fsdp_units(model.predictor.predictor_blocks, mesh))
    return [encoder, predictor] if model.head is None else [encoder, FsdpUnits(model.head, []), predictor]


def shard_units(
    model: DMTJEPA, teacher: list[FsdpUnits], student: list[FsdpUnits], mesh: DeviceMesh, plan: ComputePlan
) -> None:
    """Apply `fully_shard` to all units, then to the model."""
    # Newer versions of PyTorch warn at each start that an operation in place would damage such a view. There is none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # FSDP2 would cast a wider residual stream to the dtype of the weights where a unit of blocks begins.
    cast = model.encoder.residual_dtype is None
    policy = MixedPrecisionPolicy(plan.dtype, torch.float32, cast_forward_inputs=cast)
    for units in teacher:
        units.shard(mesh, policy, reshard_after_forward=True)  # the teacher has no backward pass
    # Without units of blocks, a module is gathered as a whole and needed again soon. Resharding would save nothing.
    reshard = plan.reshard_after_forward and any(units.blocks for units in student)
    for units in student:
        units.shard(mesh, policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def register_forward_methods(model: DMTJEPA) -> None:
    """Let the methods that training calls gather weights, like `forward`."""
    for method in ("compute_targets", "predict_targets"):
        register_fsdp_forward_method(model, method)
    for head in (model.teacher_head, model.head):
        if head is not None:
            register_fsdp_forward_method(head, "aggregate_context")
            register_fsdp_forward_method(head, "aggregate_neighbors")


def prefetch(teacher: list[FsdpUnits], student: list[FsdpUnits]) -> None:
    """Gather the weights of the next unit while a unit computes."""
    forward = _sharded(module for units in teacher + student for module in units.forward_order)
    for current, following in itertools.pairwise(forward):
        current.set_modules_to_forward_prefetch([following])
    backward = _sharded(module for units in student[::-1] for module in units.backward_order)
    for current, following in itertools.pairwise(backward):
        current.set_modules_to_backward_prefetch([following])


def _sharded(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Return modules after `fully_shard`, which makes each of them an FSDPModule."""
    return cast("list[FSDPModule]", list(modules))


def group_fsdp_units(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> list[list[nn.Module]]:
    """Group consecutive blocks into units, whose weights are cast and gathered together.

    Each unit costs the host about a millisecond per step (docs/performance.md). On several GPUs, a unit therefore has
    at least UNIT_PARAMETERS. A single GPU has no units: they would save only part of the bfloat16 weights. On a CPU,
    computation is slow enough to make each block a unit.
    """
    if mesh.device_type != "cpu" and mesh["shard"].size() == 1:
        return []
    smallest = 0 if mesh.device_type == "cpu" else UNIT_PARAMETERS
    units: list[list[nn.Module]] = []
    for block in blocks:
        if not units or sum(p.numel() for b in units[-1] for p in b.parameters()) >= smallest:
            units.append([])
        units[-1].append(block)
    return units


# Versions of PyTorch whose FSDP2 is known to work with `cast_at_once`: the tests have run with them.
CASTING_VERSIONS = ("2.10.", "2.11.", "2.15.")


def cast_at_once(model: nn.Module, *, keep: bool = False) -> None:
    """Cast all weights of a unit with one call, in a model that is not sharded; in place.

    In such a model, FSDP2 casts and copies each parameter separately, which launches 800 of the 2000 kernels of a step
    of ViT-B/16 (docs/performance.md). With several processes, it already copies all at once. This function replaces
    private methods of PyTorch. It has no effect with versions other than `CASTING_VERSIONS`, and says so in the log.

    Args:
        keep: cast at the first use alone and keep the results, see `ComputePlan.keep_copies`. Weights that are loaded
            after the first step would have no effect.
    """
    if not torch.__version__.startswith(CASTING_VERSIONS):
        logger.info(
            "torch %s: FSDP2 casts each parameter by itself, which takes more of the host's time; casting all at once "
            "was tested with torch %s only",
            torch.__version__,
            ", ".join(f"{version}*" for version in CASTING_VERSIONS),
        )
        return
    for group in _parameter_groups(model):
        replace_method(group, "wait_for_unshard", functools.partial(_cast_weights, group, keep))
        if keep:
            for parameter in group.fsdp_params:
                replace_method(parameter, "free_unsharded_param", _keep)


def weight_copies(model: nn.Module) -> dict[Tensor, Tensor]:
    """The copies that are kept between two steps (`cast_at_once`), by their parameters. There are none before a step.

    A copy has the shape of its parameter and the dtype of the computation.
    """
    return {
        parameter.sharded_param: parameter.all_gather_outputs[0].view(parameter.sharded_param.shape)
        for group in _parameter_groups(model)
        for parameter in group.fsdp_params
        if parameter.all_gather_outputs and parameter.all_gather_outputs[0].untyped_storage().size() > 0
    }


def use_one_stream(model: nn.Module, stream: torch.cuda.Stream) -> None:
    """Let FSDP2 enqueue everything on `stream`, in a model that is not sharded; call this after its first step.

    It has streams of its own for communication, of which there is none here. In the capture of a CUDA graph, each would
    have to be joined.
    """
    communication = model._get_fsdp_state()._comm_ctx  # type: ignore[operator]  # of the FSDPModule
    for name in ("all_gather_copy_in_stream", "all_gather_stream", "reduce_scatter_stream", "all_reduce_stream"):
        setattr(communication, name, stream)


def _parameter_groups(model: nn.Module) -> list[Any]:
    """The `FSDPParamGroup` of each unit."""
    units = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [unit._fsdp_param_group for unit in units if unit._fsdp_param_group is not None]


def _keep() -> None:
    """Replace `FSDPParam.free_unsharded_param`."""


def _cast_weights(group: Any, keep: bool) -> None:
    """Replace `FSDPParamGroup.wait_for_unshard` in a process that has all weights. Clears the marker of `unshard`."""
    if group._all_gather_result is None:  # already gathered
        return
    if not keep or not group.fsdp_params[0].all_gather_outputs:
        weights = [parameter._sharded_param_data for parameter in group.fsdp_params]
        for parameter, weight in zip(group.fsdp_params, weights, strict=True):
            dtype = parameter.param_dtype or weight.dtype
            parameter.init_all_gather_outputs([weight.numel()], [dtype], 1, group.device)
            parameter.alloc_all_gather_outputs()
        outputs = tuple(parameter.all_gather_outputs[0] for parameter in group.fsdp_params)
        # The backward pass may have saved these tensors. They get the same values again, so that is no modification.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(outputs):
            torch._foreach_copy_(outputs, weights)
        for parameter in group.fsdp_params:
            parameter.init_unsharded_param()
    group._to_unsharded()
    group._all_gather_result = None


# Operators whose outputs are kept if pointwise operators are recomputed.
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


def checkpoint_blocks(blocks: Iterable[nn.Module], recompute: str) -> None:
    """Let the backward pass of `blocks` recompute activations, see `ComputePlan`. Replaces their `forward`."""
    if recompute == "none":
        return
    run = functools.partial(checkpoint, use_reentrant=False)
    if recompute == "pointwise":
        run = functools.partial(run, context_fn=_keep_products)
    for block in blocks:
        replace_method(block, "forward", functools.partial(run, block.forward))


def _keep_products() -> Any:
    def choose(_context: object, operator: Any, *_arguments: object, **_keywords: object) -> CheckpointPolicy:
        # xFormers' operators are registered only when a model uses them.
        kept = operator in _PRODUCTS or operator.name() in ("xformers_flash::flash_fwd", "torch_attn::_varlen_attn")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


def set_memory_budget(recompute: str) -> None:
    """Set the memory budget with which the partitioner of compiled graphs decides what to recompute.

    With a budget of 1, it keeps everything that a backward pass without recomputation needs. With less, it recomputes
    the outputs of pointwise operators first. They suffice for a budget of 0.9.
    """
    torch._functorch.config.activation_memory_budget = 0.9 if recompute == "pointwise" else 1.0


def compile_blocks(model: DMTJEPA, compiler: Compiler = torch.compile, *, autotune_teacher: bool = False) -> None:
    """Compile blocks and heads without graph breaks. The number of patches is symbolic where it varies.

    Args:
        autotune_teacher: time kernels for the products of the teacher's blocks, whose shapes never change.
    """
    mode = {"mode": "max-autotune-no-cudagraphs"} if autotune_teacher else {}
    for block in student_blocks(model):
        replace_method(block, "forward", _compile_varying(block.forward, compiler))
    for block in model.teacher_encoder.blocks:
        replace_method(block, "forward", compiler(block.forward, fullgraph=True, dynamic=False, **mode))
    for head, method in ((model.teacher_head, "aggregate_neighbors"), (model.head, "aggregate_context")):
        if head is not None:
            replace_method(head, method, _compile_varying(getattr(head, method), compiler))


def _compile_varying(function: Callable[..., Tensor], compiler: Compiler) -> Callable[..., Tensor]:
    """Compile `function` for any number of patches: dimension 1 of a batch [B, L, ...], dimension 0 of a list [U]."""
    compiled = compiler(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def run(*arguments: Tensor | tuple[Any, ...] | None) -> Tensor:
        mark_varying(arguments)
        return compiled(*arguments)

    def mark_varying(value: Tensor | tuple[Any, ...] | int | None) -> None:
        if isinstance(value, Tensor):
            torch._dynamo.maybe_mark_dynamic(value, 1 if value.ndim > 1 else 0)
        elif isinstance(value, tuple):
            for element in value:
                mark_varying(element)

    return run
