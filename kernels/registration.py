"""Registration of the operators with PyTorch: implementations per device, shapes for `torch.compile`, gradients."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .checks import accumulation_dtype


def define_operator(schema: str, *, cuda: Callable, cpu: Callable, fake: Callable) -> CustomOpDef:
    """Defines the custom operator `dmtjepa::<name>`.

    Args:
        schema: name, arguments and result, as in "scale(Tensor x, float factor) -> Tensor". The implementations take
            the same arguments.
        cuda, cpu: the implementation for CUDA tensors and the one for CPU tensors.
        fake: returns an empty tensor of the result's shape, dtype and device; `torch.compile` runs it in their place.
    """
    name, parenthesis, rest = schema.partition("(")
    operator = torch.library.custom_op(
        f"dmtjepa::{name}", cuda, mutates_args=(), device_types="cuda", schema=parenthesis + rest
    )
    operator.register_kernel("cpu", cpu)
    operator.register_fake(fake)
    return operator


def differentiate_through(operator: CustomOpDef, plain: Callable) -> None:
    """Makes `operator` differentiable: its backward pass is that of `plain`, the same function in plain PyTorch.

    `plain` runs again in the backward pass, in float32 or wider, so that each gradient is rounded once. The operator
    takes its tensors before its other arguments.
    """

    def setup_context(ctx, inputs, output) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.settings = inputs[len(tensors) :]

    def backward(ctx, grad: Tensor):
        inputs = list(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        for i in wanted:
            inputs[i] = inputs[i].detach().to(accumulation_dtype(inputs[i].dtype)).requires_grad_()
        with torch.enable_grad():
            output = plain(*inputs, *ctx.settings)
        leaves = [inputs[i] for i in wanted]
        found = torch.autograd.grad(output, leaves, grad.to(output.dtype), materialize_grads=True)
        grads: list[Tensor | None] = [None] * (len(inputs) + len(ctx.settings))
        for i, leaf_grad in zip(wanted, found, strict=True):
            grads[i] = leaf_grad.to(ctx.saved_tensors[i].dtype)
        return tuple(grads)

    operator.register_autograd(backward, setup_context=setup_context)
