"""The teacher's encoder in 8-bit floating point: the linear layers of its blocks multiply in float8_e4m3fn.

There is only a forward pass, since the teacher has no backward pass. Each token of the activations and each output
channel of a weight has its own scale, which maps its largest magnitude to 448, the largest number of the format.

Each call quantises the weights that FSDP2 has gathered. Parameters, checkpoints and the average of the teacher do not
change, and no quantised copy can become stale after an update. This costs 5 bytes of memory traffic per weight: about
1 ms of a step of ViT-H on an H100 (predicted), compared to about 50 ms for the products in bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from dmtjepa.models.layers import Linear
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


def compute_in_fp8(module: nn.Module, device_type: str) -> None:
    """Let all `Linear` layers in `module` multiply in float8, in place.

    Args:
        module: the blocks of an encoder that is not compiled or sharded yet.
        device_type: `cuda`, which must support float8 products, or `cpu`, which emulates them.

    Raises:
        ValueError: the GPU has no float8 products, or a width is not a multiple of 16.
    """
    multiply = functools.partial(fp8_linear, product=choose_product(device_type))
    for linear in module.modules():
        if isinstance(linear, Linear):
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
    """Return the product for a device type: `scaled_product` on CUDA, `emulated_product` on a CPU."""
    if device_type != "cuda":
        return emulated_product
    _check_device(torch.cuda.current_device())
    return scaled_product


@functools.cache
def _check_device(device: int) -> None:
    """Check that `scaled_product` runs on a GPU.

    Raises:
        ValueError: the GPU, or this build of PyTorch, has no float8 products with a scale per row.
    """
    capability = torch.cuda.get_device_capability(device)
    reason = f"has {capability[0]}.{capability[1]}"
    if capability >= (8, 9):
        try:
            quantized, scale = quantize_rows(torch.ones(MULTIPLE, MULTIPLE, device="cuda"))
            scaled_product(quantized, scale, quantized, scale, torch.zeros(MULTIPLE, device="cuda"))
            return
        except RuntimeError as error:  # this build of PyTorch lacks the kernel for it
            reason += f" and says: {str(error).splitlines()[0]}"
    raise ValueError(
        f"runtime.teacher_precision fp8 needs a GPU that multiplies in float8 with a scale per row (compute capability "
        f"8.9 or 9.0 and later: L40, H100, B200); {torch.cuda.get_device_name(device)} {reason}. Choose same"
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of x [M, K]: float8_e4m3fn [M, K] and float32 scales [M, 1], whose product is about x.

    A row that contains an infinity or NaN becomes NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `x @ weight.T + bias` on a GPU -> [M, N] bfloat16. See `Product` for the arguments.

    PyTorch uses cuBLAS on compute capability 9.0 and CUTLASS on others. With torch < 2.12, the kernel for 8.9 always
    runs on the default stream (pytorch#177651), on which this project computes except for CUDA graphs.
    """
    return torch._scaled_mm(
        x,
        weight.t(),  # the second matrix must be column-major; the scales are [M, 1] and [1, N]
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        bias=bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        # Faster on Hopper. Partial sums have 14 bits, far more than the 4 bits of their terms.
        use_fast_accum=True,
    )


def needs_default_stream() -> bool:
    """Whether `scaled_product` is right on the default stream alone, on the current GPU."""
    ada = torch.cuda.is_available() and torch.cuda.get_device_capability() == (8, 9)
    return ada and TorchVersion(torch.__version__) < "2.12"


def emulated_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `x @ weight.T + bias` of float8 matrices on any device, with sums in float32 -> [M, N] float32."""
    return (x.float() @ weight.float().t()) * x_scale * weight_scale.t() + bias
