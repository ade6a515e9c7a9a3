"""How a device computes a run: the settings that depend on the kind of device, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dmtjepa.config import Config


@dataclass(frozen=True)
class ComputePlan:
    """How a device computes.

    Args:
        dtype: dtype in which the modules compute. Weights, gradients and optimizer state are float32.
        compiled: whether `torch.compile` compiles blocks and heads.
        recompute: what the backward pass computes again instead of keeping it. Per patch, a block of width D keeps
            about 16 D numbers with `none`, 10 D with `pointwise` (norms and GELUs are recomputed), D with `blocks`.
        reshard_after_forward: whether the student frees gathered weights after the forward pass and gathers them again
            for the backward pass.
        keep_copies: whether weights in `dtype` are kept from step to step in a model that is not sharded. Who updates
            weights then updates these too (`weight_copies`).
        autotune_teacher: whether `torch.compile` times kernels for the products of the teacher's blocks and takes the
            fastest.
    """

    dtype: torch.dtype = torch.float32
    compiled: bool = False
    recompute: Literal["none", "pointwise", "blocks"] = "none"
    reshard_after_forward: bool = True
    keep_copies: bool = False
    autotune_teacher: bool = False

    @classmethod
    def from_config(cls, config: Config, device_type: str) -> ComputePlan:
        """Resolve the `auto` settings for a device type, `cuda` or `cpu`."""
        runtime, on_cuda = config.runtime, device_type == "cuda"
        if runtime.precision != "auto":
            dtype = getattr(torch, runtime.precision)
        else:
            dtype = torch.bfloat16 if on_cuda and config.meta.use_bfloat16 else torch.float32
        compiled = runtime.compile == "on" or (runtime.compile == "auto" and on_cuda)
        recompute = runtime.activation_checkpointing
        if recompute == "auto":
            recompute = "pointwise" if compiled else "none"
        keep_copies, autotune = runtime.fused_update, runtime.autotune_teacher
        return cls(dtype, compiled, recompute, runtime.reshard_after_forward, keep_copies, autotune)
