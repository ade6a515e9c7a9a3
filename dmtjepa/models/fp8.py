"""The teacher's encoder in 8-bit floating point: its blocks' linear layers multiply in float8_e4m3fn.

There is a forward pass alone, which is all that a teacher needs. Every row of the activations and every row of a weight
(an output channel) has its own scale, which maps its largest magnitude to 448, the format's largest number.

Weights are quantised anew at each call, from what FSDP2 has gathered. So parameters, checkpoints and the teacher's
average stay as they are, and nothing is kept that could be stale after an update. It costs 5 bytes of traffic per
weight: about 1 ms of a step at ViT-H on an H100 (predicted), where the products in bfloat16 take some 50 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

# (x [M, K] float8, scale [M, 1], weight [N, K] float8, scale [N, 1], bias [N]) -> [M, N]
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# The products want every width to be a multiple of 16 bytes.
MULTIPLE = 16


class Fp8Linear(nn.Linear):
    """A linear layer over the parameters of another, which multiplies in float8: [..., K] -> [..., N]."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            raise ValueError(
                f"a linear layer of {self.in_features} to {self.out_features} channels cannot multiply in float8, "
                f"which takes multiples of {MULTIPLE}; choose runtime.teacher_precision: same"
            )
        self.weight, self.bias = linear.weight, linear.bias
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        rows = self.product(*quantize_rows(x.flatten(0, -2)), *quantize_rows(self.weight), self.bias)
        return rows.to(x.dtype).view(*x.shape[:-1], self.out_features)


def compute_in_fp8(blocks: nn.ModuleList, device_type: str) -> None:
    """Let the linear layers of transformer blocks multiply in float8, in place. Names and parameters do not change.

    Args:
        blocks: of an encoder, before it is compiled or sharded.
        device_type: `cuda`, where float8 products must exist, or `cpu`, which emulates them.

    Raises:
        ValueError: the GPU has no float8 products, or a width is no multiple of 16.
    """
    product = choose_product(device_type)
    for block in blocks:
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(part, name, Fp8Linear(getattr(part, name), product))


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
