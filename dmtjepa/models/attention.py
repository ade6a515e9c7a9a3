"""Backends of attention. A model chooses one when it is built.

Every backend maps queries, keys and values [B, L, H, E] (E is the head size) to [B, L, H, E]: softmax(q k / sqrt(E)) v.
With a `Packing`, the shape is [1, L, H, E], and each element attends to the elements of its own sequence.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dmtjepa.packing import Packing

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Packing | None], Tensor]

# Measurements that override the default of `auto`: (compute capability, head size) -> backend. Every entry needs a
# result file in benchmarks/results. On an H200, both backends took the same time at every shape.
MEASURED_CHOICES: dict[tuple[tuple[int, int], int], str] = {}


# Flash kernels for sequences of different lengths, and all of xFormers', need head sizes that are multiples of this.
HEAD_SIZE_MULTIPLE = 8
HALF = (torch.bfloat16, torch.float16)

# All kernels of SDPA but cuDNN's, which PyTorch prefers on Hopper. cuDNN builds a plan for each new shape, and the
# number of patches of a context differs from step to step.
SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def check_attention(backend: str, head_dim: int) -> None:
    """Check that `choose_attention` can serve a GPU. Needs none.

    Args:
        backend: `xformers`, `sdpa` or `auto`.
        head_dim: head size E.

    Raises:
        ValueError: the backend is unknown, or it is `xformers`, which has no kernel for the head size.
        ModuleNotFoundError: the backend is `xformers`, which is not installed.
    """
    if backend not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"attention backend {backend!r}: choose auto, xformers or sdpa")
    if backend == "xformers" and head_dim % HEAD_SIZE_MULTIPLE:
        raise ValueError(
            f"attention backend xformers has no kernel for heads of {head_dim} channels, only for multiples of "
            f"{HEAD_SIZE_MULTIPLE}; choose runtime.attention: sdpa or auto"
        )
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ModuleNotFoundError("attention backend xformers: not installed; pip install xformers, or choose sdpa")


def choose_attention(backend: str, device_type: str, head_dim: int) -> AttentionFunction:
    """Return the attention function for a model.

    Args:
        backend: `xformers`, `sdpa` (PyTorch's own flash kernels), or `auto`. On CUDA, `auto` chooses xFormers if it is
            installed, has a kernel for the head size, and no entry of `MEASURED_CHOICES` says otherwise.
        device_type: type of the device on which the model will run. On a CPU, all backends are `cpu_attention`, since
            xFormers has no CPU operators.
        head_dim: head size E.

    Raises:
        ValueError, ModuleNotFoundError: see `check_attention`.
    """
    if device_type != "cuda":
        return cpu_attention
    check_attention(backend, head_dim)
    _count_varlen_flops()
    if backend == "sdpa" or head_dim % HEAD_SIZE_MULTIPLE:
        return flash_attention
    if importlib.util.find_spec("xformers") is None:
        warnings.warn("xFormers is not installed: attention runs on PyTorch's own flash kernels", stacklevel=2)
        return flash_attention
    if backend == "auto" and MEASURED_CHOICES.get((torch.cuda.get_device_capability(), head_dim)) == "sdpa":
        return flash_attention
    load_xformers()
    return xformers_attention


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """Compute attention by PyTorch's scaled_dot_product_attention. Pads the sequences of a packing."""
    mask = None
    if packing is not None:
        query, key, value = map(packing.pad, (query, key, value))
        mask = packing.present()[:, None, None]
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
    out = out.transpose(1, 2)
    return out if packing is None else packing.unpad(out)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """Compute attention by PyTorch's own flash kernels on CUDA, never by cuDNN.

    float32 has no flash kernel and uses the memory-efficient one. A packing needs no padding in bfloat16 and float16 if
    the head size is a multiple of 8.
    """
    with sdpa_kernel(SDPA_KERNELS):  # newer versions of varlen_attn choose cuDNN, too
        if packing is not None and query.dtype in HALF and query.shape[-1] % HEAD_SIZE_MULTIPLE == 0:
            longest = packing.padded.shape[1]
            out = varlen_attn(query[0], key[0], value[0], packing.start, packing.start, longest, longest)
            return cast(Tensor, out)[None]  # not the tuple of other options
        return sdpa_attention(query, key, value, packing)


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """Compute attention on a CPU: by SDPA, or by two batched products in bfloat16.

    In bfloat16, the backward pass of SDPA is 3 to 6 times slower on a CPU than that of the products. A model that was
    built for a CPU and then moved to a GPU uses PyTorch's flash kernels.
    """
    if query.device.type == "cuda":
        return flash_attention(query, key, value, packing)
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return sdpa_attention(query, key, value, packing)
    if packing is not None:
        query, key, value = map(packing.pad, (query, key, value))
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    score = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if packing is not None:
        score = score.masked_fill(~packing.present()[:, None, None], -torch.inf)
    out = (score.softmax(3, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)
    return out if packing is None else packing.unpad(out)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """Compute attention by xFormers' flash kernels, for bfloat16 and float16 on CUDA.

    Other dtypes use `flash_attention`. Head sizes must be multiples of 8. The kernels take concatenated sequences, so
    that a packing needs no padding.
    """
    if query.dtype not in HALF:
        return flash_attention(query, key, value, packing)
    if packing is None:
        return _FlashAttention.apply(query, key, value, None, query.shape[1], key.shape[1])
    longest = packing.padded.shape[1]
    return _FlashAttention.apply(query[0], key[0], value[0], packing.start, longest, longest)[None]


# FLOPs of attention. Forward: two products of the queries with all keys of a sequence; for a packing, with those of the
# longest one. Backward: five products, for the scores again and the gradients of scores, queries, keys and values.


@functools.cache
def _count_varlen_flops() -> None:
    """Register the FLOPs of `varlen_attn` with PyTorch's counter.

    Newer versions of PyTorch have formulas of their own. On tensors without values, these take each sequence to be as
    long as the longest one, for queries, too.
    """
    operators = torch.ops.torch_attn
    for operator in (operators._varlen_attn, operators._varlen_attn_backward):
        flop_registry.pop(operator, None)
    register_flop_formula(operators._varlen_attn)(
        lambda query, key, value, starts, key_starts, most_queries, most_keys, *_, **__: (
            4 * math.prod(query) * most_keys
        )
    )
    register_flop_formula(operators._varlen_attn_backward)(
        lambda grad, query, key, value, out, lse, starts, key_starts, most_queries, most_keys, *_, **__: (
            10 * math.prod(query) * most_keys
        )
    )


@functools.cache
def load_xformers() -> None:
    """Import xFormers' flash operators and register their FLOPs with PyTorch's counter."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that its C++ library is missing, which these operators do not need
    try:
        import xformers.ops.fmha.flash  # noqa: F401
    finally:
        logger.setLevel(level)
    operators = torch.ops.xformers_flash
    torch.library.register_fake("xformers_flash::flash_fwd", _describe_flash_outputs, allow_override=True)
    register_flop_formula(operators.flash_fwd)(
        lambda query, key, value, starts, key_starts, used, most_queries, most_keys, *_, **__: (
            4 * math.prod(query) * most_keys
        )
    )
    register_flop_formula(operators.flash_bwd)(
        lambda share, grad, query, key, value, out, lse, starts, key_starts, most_queries, most_keys, *_, **__: (
            10 * math.prod(query) * most_keys
        )
    )


def _describe_flash_outputs(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `flash_fwd` returns: output, log-sum-exp, and the state of the random numbers.

    xFormers says that the state is int64. torch.compile of PyTorch 2.15 ends if a type is not the one it was told.
    """
    *batch, length, num_heads, _head_size = query.shape
    log_sum_exp = query.new_empty((*batch, num_heads, length), dtype=torch.float32)
    return torch.empty_like(query), log_sum_exp, query.new_empty(2, dtype=torch.uint64)


class _FlashAttention(torch.autograd.Function):
    """xFormers' operators `flash_fwd` and `flash_bwd`, which run PyTorch's own flash kernels.

    `xformers.ops.memory_efficient_attention` is not used. Its dispatch rejects all inputs on CUDA if xFormers' C++
    library does not load, which is the case for release 0.0.35 on PyPI with a PyTorch built for CUDA 13. These
    operators do not need that library.

    Queries are [B, L, H, E], keys and values [B, S, H, E]. With `start` [num + 1], where concatenated sequences begin,
    all are [L, H, E].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, most_queries: int, most_keys: int
    ) -> Tensor:
        ctx.scale, ctx.most = query.shape[-1] ** -0.5, (most_queries, most_keys)
        out, log_sum_exp, random = torch.ops.xformers_flash.flash_fwd(
            query, key, value, start, start, None, *ctx.most, 0.0, ctx.scale, False, -1, -1, False, None
        )
        ctx.save_for_backward(query, key, value, start, out, log_sum_exp, random)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, start, out, log_sum_exp, random = ctx.saved_tensors
        gradients = torch.ops.xformers_flash.flash_bwd(
            False, grad.contiguous(), query, key, value, out, log_sum_exp, start, start, *ctx.most, 0.0, ctx.scale,
            False, -1, -1, random,
        )  # fmt: skip
        return *gradients, None, None, None
