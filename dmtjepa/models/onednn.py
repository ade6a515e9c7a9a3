"""Linear layers on a CPU, by oneDNN.

PyTorch sends products in float32 to MKL, and writes the bias into the result before it adds the product to it. oneDNN
adds the bias to what it is about to write, and needs less time for x @ weight.T and grad @ weight
(docs/performance.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dmtjepa.models.layers import Linear


def compute_by_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply by oneDNN where PyTorch has it, in place; for a model on a CPU."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if isinstance(module, Linear):
                module.multiply = onednn_linear


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: [..., K], [N, K], [N] -> [..., N], of one dtype.

    oneDNN takes float32, and bfloat16 where the CPU multiplies in it; PyTorch computes what it does not take.
    """
    return _onednn_linear(x, weight, bias)


@torch.library.custom_op("dmtjepa::onednn_linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output) -> None:
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    for_x = onednn_linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
    # oneDNN is slower than MKL here.
    for_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return for_x, for_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


_onednn_linear.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.dmtjepa.onednn_linear)
def _flops(x, weight, _bias, **_keywords) -> int:
    return 2 * math.prod(x) * weight[0]
