"""AdamW on the shards of a rank, its parameter groups, and the norm and clipping of the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmtjepa.tensors import local_tensors


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict]:
    """AdamW's groups in the published order: weights of the first two modules (encoder, predictor), their biases and
    1-dimensional parameters (never decayed), then the same two groups of each further module (the head)."""
    modules = list(modules)
    groups = []
    for part in (modules[:2], *([module] for module in modules[2:])):
        for decayed in (True, False):
            for module in part:
                chosen = [p for name, p in module.named_parameters() if p.requires_grad and _decays(name, p) == decayed]
                groups.append({"params": chosen, "decayed": decayed} | ({} if decayed else {"weight_decay": 0.0}))
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: Tensor) -> bool:
    return "bias" not in name and parameter.ndim != 1


class ShardedAdamW(torch.optim.AdamW):
    """AdamW in one fused kernel, on this rank's shards as ordinary tensors; betas 0.9 and 0.999, eps 1e-8.

    Through sharded tensors (DTensor) the same kernel would cost time on the host, and memory without end: their
    dispatch remembers each call by its arguments, and learning rate and weight decay are new ones at every step.

    `found_inf`, a float32 scalar on the device, makes a step do nothing where it is 1, without asking the host.
    """

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, lr=0.0, fused=True)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            state: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *state)
            beta1, beta2 = group["betas"]
            tensors: list[Any] = [local_tensors(part) for part in state]
            options: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            options |= {"fused": True, "found_inf": self.found_inf, "amsgrad": False, "maximize": False}
            adamw(*tensors, beta1=beta1, beta2=beta2, **options)


def build_optimizer(modules: Iterable[nn.Module]) -> ShardedAdamW:
    """The optimizer with the published groups."""
    return ShardedAdamW(parameter_groups(modules))


def set_schedules(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Write a step's learning rate, and its weight decay where a group is decayed, into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["decayed"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], loss: Tensor, num_copies: int = 1) -> Tensor:
    """The norm of the whole gradient: a float32 scalar on the device, the same on every rank.

    It is not finite if any gradient or the loss of any rank is not: all ranks see alike whether a step can be made.

    Args:
        parameters: sharded over the ranks of `num_copies` groups which all hold the same gradient.
        loss: this rank's, a scalar.
    """
    gradients = local_tensors(p.grad for p in parameters if p.grad is not None)
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    squares = squares + 0.0 * loss  # 0 * inf and 0 * nan are nan
    torch.distributed.all_reduce(squares)
    return (squares / num_copies).sqrt()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm, given as `norm`, is at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local_tensors(p.grad for p in parameters if p.grad is not None), scale)
