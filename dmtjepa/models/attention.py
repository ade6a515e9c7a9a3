"""Attention behind one function, chosen once when a model is built.

Every backend maps queries, keys and values [B, L, H, E] (E is the head size) to [B, L, H, E]: softmax(q k / sqrt(E)) v.
With a `Packing` they are [1, L, H, E], and each element attends to those of its own sequence.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dmtjepa.packing import Packing

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Packing | None], Tensor]

# Measurements that overrule the default of `auto`: (compute capability, head size) -> backend. A row belongs to a
# result file in benchmarks/results; none has been measured yet.
MEASURED_CHOICES: dict[tuple[tuple[int, int], int], str] = {}


def choose_attention(backend: str, device_type: str, head_dim: int) -> AttentionFunction:
    """The attention function for a model.

    Args:
        backend: `xformers` (memory_efficient_attention), `sdpa` (PyTorch's), or `auto`, which on CUDA takes xFormers
            unless a measurement kept in `MEASURED_CHOICES` says otherwise.
        device_type: where the model will run; a CPU runs `cpu_attention`, since xFormers has no CPU operators.
        head_dim: head size E.

    Raises:
        ValueError: the backend is unknown.
        ModuleNotFoundError: `xformers` was asked for by name and is not installed.
    """
    if backend not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"attention backend {backend!r}: choose auto, xformers or sdpa")
    if device_type != "cuda":
        return cpu_attention
    if backend == "sdpa":
        return sdpa_attention
    installed = importlib.util.find_spec("xformers") is not None
    if backend == "auto":
        measured = MEASURED_CHOICES.get((torch.cuda.get_device_capability(), head_dim))
        if measured == "sdpa":
            return sdpa_attention
        if not installed:
            warnings.warn("xFormers is not installed: attention runs on PyTorch's SDPA", stacklevel=2)
            return sdpa_attention
    elif not installed:
        raise ModuleNotFoundError("attention backend xformers: not installed; pip install xformers, or choose sdpa")
    return xformers_attention


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; sequences of a packing are padded for it."""
    mask = None
    if packing is not None:
        query, key, value = map(packing.pad, (query, key, value))
        mask = packing.present[:, None, None]
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
    out = out.transpose(1, 2)
    return out if packing is None else packing.unpad(out)


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """SDPA in float32; two batched products in bfloat16, where SDPA's backward pass is 3 to 6 times slower on a CPU."""
    if query.dtype != torch.bfloat16:
        return sdpa_attention(query, key, value, packing)
    if packing is not None:
        query, key, value = map(packing.pad, (query, key, value))
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    score = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if packing is not None:
        score = score.masked_fill(~packing.present[:, None, None], -torch.inf)
    out = (score.softmax(3, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)
    return out if packing is None else packing.unpad(out)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing | None = None) -> Tensor:
    """xFormers' memory_efficient_attention; CUDA, bfloat16, float16 or float32.

    A packing becomes a BlockDiagonalMask, which its flash kernels take without padding; they have no float32.
    """
    if packing is None:
        return _memory_efficient(query, key, value, None, 0)[0]
    if query.dtype == torch.float32:
        return sdpa_attention(query, key, value, packing)
    return _memory_efficient(query, key, value, packing.start, packing.padded.shape[1])[0]


# An operator of our own around xFormers' forward and backward: torch.compile(fullgraph=True) then never looks into
# xFormers' dispatch, which is Python and differs from release to release.
@torch.library.custom_op("dmtjepa::memory_efficient_attention", mutates_args=(), device_types="cuda")
def _memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    mask = None if start is None else block_diagonal(start, longest)
    out, log_sum_exp = fmha.memory_efficient_attention_forward_requires_grad(query, key, value, mask)
    return out.contiguous(), log_sum_exp.contiguous()


@_memory_efficient.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("dmtjepa::memory_efficient_attention_backward", mutates_args=(), device_types="cuda")
def _memory_efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    longest: int,
    out: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import fmha

    mask = None if start is None else block_diagonal(start, longest)
    gradients = fmha.memory_efficient_attention_backward(grad, out, log_sum_exp, query, key, value, mask)
    return tuple(gradient.contiguous() for gradient in gradients)


@_memory_efficient_backward.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_rest) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    query, key, value, start, ctx.longest = inputs
    ctx.save_for_backward(query, key, value, start, *output)


def _differentiate(ctx, grad: Tensor, _grad_log_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, start, *output = ctx.saved_tensors
    gradients = _memory_efficient_backward(grad.contiguous(), query, key, value, start, ctx.longest, *output)
    return *gradients, None, None


_memory_efficient.register_autograd(_differentiate, setup_context=_save)


def block_diagonal(start: Tensor, longest: int):
    """xFormers' BlockDiagonalMask of sequences that begin at `start` [S + 1], int32 on the device.

    `BlockDiagonalMask.from_seqlens` makes the same from lengths on the host. The starts as Python numbers are left out:
    they would have to be brought from the device, and the flash kernels do not read them.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    sequences = _SeqLenInfo(seqstart=start, max_seqlen=longest, min_seqlen=1, seqstart_py=[])
    return BlockDiagonalMask(q_seqinfo=sequences, k_seqinfo=sequences)


@register_flop_formula(torch.ops.dmtjepa.memory_efficient_attention)
def _forward_flops(query, key, value, start, longest, **_keywords) -> int:
    """Two products of the queries with as many rows as there are keys: of a packing, its longest sequence's."""
    batch, length, heads, head_dim = query
    return 4 * batch * heads * length * (key[1] if start is None else longest) * head_dim


@register_flop_formula(torch.ops.dmtjepa.memory_efficient_attention_backward)
def _backward_flops(grad, query, key, value, start, longest, *_arguments, **_keywords) -> int:
    """Five such products: the scores again, and the gradients of scores, queries, keys and values."""
    batch, length, heads, head_dim = query
    return 10 * batch * heads * length * (key[1] if start is None else longest) * head_dim
