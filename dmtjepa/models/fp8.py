"""The teacher's encoder in 8-bit floating point: the linear layers of its blocks multiply in float8_e4m3fn.

There is only a forward pass; a teacher needs no more. Each row of the activations and each row of a weight (an output
channel) has its own scale, which maps its largest magnitude to 448, the largest number of the format.

Weights are quantised at each call from what FSDP2 has gathered. Parameters, checkpoints and the average of the teacher
stay as they are, and no quantised copy can become stale after an update. This costs 5 bytes of traffic per weight:
about 1 ms of a step of ViT-H on an H100 (predicted), where the products in bfloat16 take about 50 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dmtjepa.models.replace_method import replace_method

# (x [M, K] float8, scale [M, 1], weight [N, K] float8, scale [N, 1], bias [N]) -> [M, N]
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# The products require that every width is a multiple of 16 bytes.
MULTIPLE = 16


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor, *, product: Product) -> Tensor:
    """Compute `x @ weight.T + bias` in float8: [..., K], [N, K], [N] -> [..., N] in the dtype of x."""
    out = product(*quantize_rows(x.flatten(0, -2)), *quantize_rows(weight), bias)
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


def compute_in_fp8(blocks: Iterable[Any], device_type: str) -> None:
    """Let the linear layers of transformer blocks multiply in float8, in place.

    Args:
        blocks: blocks of an encoder that is not compiled or sharded yet.
        device_type: `cuda`, which must support float8 products, or `cpu`, which emulates them.

    Raises:
        ValueError: the GPU has no float8 products, or a width is not a multiple of 16.
    """
    multiply = functools.partial(fp8_linear, product=choose_product(device_type))
    for block in blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            check_widths(linear)
            replace_method(linear, "multiply", multiply)


def check_widths(linear: nn.Linear) -> None:
    """Check that a layer can multiply in float8.

    Raises:
        ValueError: a width is not a multiple of 16.
    """
    if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        raise ValueError(
            f"a linear layer of {linear.in_features} to {linear.out_features} channels cannot multiply in float8, "
            f"which takes multiples of {MULTIPLE}; choose runtime.teacher_precision: same"
        )


def computes_in_fp8(module: nn.Module) -> bool:
    """Return whether `compute_in_fp8` has changed this module."""
    multiply = getattr(module, "multiply", None)
    return isinstance(multiply, functools.partial) and multiply.func is fp8_linear


def choose_product(device_type: str) -> Product:
    """The product for a device: the GPU's own, or on a CPU, which has none, the same roundings in float32."""
    if device_type != "cuda":
        return emulated_product
    _check_device(torch.cuda.current_device())
    return scaled_product


@functools.cache
def _check_device(device: int) -> None:
    """Refuse a GPU on which `scaled_product` does not run."""
    capability = torch.cuda.get_device_capability(device)
    reason = f"has {capability[0]}.{capability[1]}"
    if capability >= (8, 9):
        try:
            rows, scale = quantize_rows(torch.ones(MULTIPLE, MULTIPLE, device="cuda"))
            scaled_product(rows, scale, rows, scale, torch.zeros(MULTIPLE, device="cuda"))
            return
        except RuntimeError as error:  # this build of PyTorch lacks the kernel for it
            reason += f" and says: {str(error).splitlines()[0]}"
    raise ValueError(
        f"runtime.teacher_precision fp8 needs a GPU that multiplies in float8 with a scale per row (compute capability "
        f"8.9 or 9.0 and later: L40, H100, B200); {torch.cuda.get_device_name(device)} {reason}. Choose same"
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> float8_e4m3fn [M, K] and float32 scales [M, 1], so that rows are about float8 * scale.

    A row that is not finite becomes NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias on a GPU -> [M, N] bfloat16.

    cuBLAS runs it on compute capability 9.0, CUTLASS elsewhere. (With torch < 2.12 the kernel for 8.9 is launched on
    the default stream, whichever is current, pytorch#177651; this project computes on that one.)
    """
    return torch._scaled_mm(
        x,
        weight.t(),  # it takes a row-major times a column-major matrix, and scales [M, 1] and [1, N]
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        bias=bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        # Partial sums have 14 bits, far more than the 4 of their terms; without it Hopper is slower.
        use_fast_accum=True,
    )


def emulated_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias of the same float8 numbers, with sums in float32 -> [M, N] float32."""
    return (x.float() @ weight.float().t()) * x_scale * weight_scale.t() + bias
