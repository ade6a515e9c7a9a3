"""Linear layers computed by oneDNN on a CPU.

PyTorch computes float32 products by MKL: it copies the bias to the output and then adds the product. oneDNN adds the
bias when it writes the output, and is faster for `x @ weight.T` and `grad @ weight` (docs/performance.md).
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
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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
    # MKL is faster than oneDNN here.
    for_weight = flat_grad.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return for_x, for_weight, flat_grad.sum(0) if ctx.needs_input_grad[2] else None


_onednn_linear.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.dmtjepa.onednn_linear)
def _flops(x: Sequence[int], weight: Sequence[int], _bias: object, **_keywords: object) -> int:
    return 2 * math.prod(x) * weight[0]
