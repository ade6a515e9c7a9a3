"""Linear layers computed by oneDNN on a CPU.

PyTorch computes float32 products by MKL: it copies the bias to the output and then adds the product. oneDNN adds the
bias when it writes the output, and is faster for `x @ weight.T` and `grad @ weight` (docs/performance.md).

oneDNN generates code for each new shape and keeps it in memory; that takes about as long as a product of 2,500 rows.
The number of covered patches, and with `mask.pack` that of context patches, differs in nearly every step. So rows are
padded to few different numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dmtjepa.models.layers import Linear
from dmtjepa.models.replace_method import replace_method
from dmtjepa.models.signal_stack import protect_from_signals

_protected = False  # whether this process has called `protect_from_signals`


def compute_by_onednn(model: nn.Module) -> None:
    """Let the `Linear` layers of a model on a CPU multiply by oneDNN, in place. No effect if PyTorch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return
    protect_from_signals()
    for module in model.modules():
        if isinstance(module, Linear):
            replace_method(module, "multiply", onednn_linear)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `x @ weight.T + bias`: [..., K], [N, K], [N] -> [..., N].

    oneDNN computes float32, and bfloat16 if the CPU has instructions for it. `torch.nn.functional.linear` computes
    other dtypes. It also computes everything under `torch.autocast`, which chooses dtypes itself.
    """
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _onednn_linear(x, weight, bias)


@torch.library.custom_op("dmtjepa::onednn_linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    global _protected
    if not _protected:  # a process that received a model instead of building it
        protect_from_signals()
        _protected = True
    if x.dtype == weight.dtype and (
        x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        rows = x.flatten(0, -2)
        out = torch.ops.mkldnn._linear_pointwise(pad_rows(rows), weight, bias, "none", [], "")
        return out[: len(rows)].unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def pad_rows(x: Tensor) -> Tensor:
    """Append rows of zeros to [M, K], so that M is one of at most 32 numbers between two powers of two.

    M grows by less than a 32nd. The result of each row does not change.
    """
    step = 1 << max(len(x).bit_length() - 6, 0)
    missing = -len(x) % step
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    flat_grad = grad.flatten(0, -2)
    for_x = onednn_linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
    for_weight = _weight_gradient(flat_grad, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
    return for_x, for_weight, flat_grad.sum(0) if ctx.needs_input_grad[2] else None


@torch.library.custom_op("dmtjepa::weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Compute `grad.T @ x`: [M, N], [M, K] -> [N, K]. An operator, so that torch.compile does not trace its padding."""
    if grad.dtype == torch.bfloat16:  # PyTorch computes bfloat16 by oneDNN, and float32 by MKL, which is faster here
        grad, x = pad_rows(grad), pad_rows(x)
    return grad.t() @ x


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


_onednn_linear.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.dmtjepa.onednn_linear)
def _flops(x: Sequence[int], weight: Sequence[int], _bias: object, **_keywords: object) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.dmtjepa.weight_gradient)
def _weight_gradient_flops(grad: Sequence[int], x: Sequence[int], **_keywords: object) -> int:
    return 2 * math.prod(grad) * x[1]
