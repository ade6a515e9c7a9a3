"""AdamW on the shards of a rank, its parameter groups, and the norm and clipping of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmtjepa.tensors import local_tensors

UPDATED_BYTES = 2**28
"""At most so many bytes of weights are updated at once, unless a single one is larger. Who compares weights before and
after an update copies no more than these."""


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW in the order of the official code.

    Encoder and predictor, the first two modules, have two groups of weights, then two groups of biases and
    1-dimensional parameters, which have no weight decay. Each further module (the head) has one group of each.
    """
    modules = list(modules)
    groups = []
    for together in (modules[:2], *([module] for module in modules[2:])):
        for decayed in (True, False):
            for module in together:
                chosen = [
                    p for name, p in module.named_parameters() if p.requires_grad and _is_decayed(name, p) == decayed
                ]
                groups.append({"params": chosen, "decayed": decayed} | ({} if decayed else {"weight_decay": 0.0}))
    return [group for group in groups if group["params"]]


def _is_decayed(name: str, parameter: Tensor) -> bool:
    return "bias" not in name and parameter.ndim != 1


class ShardedAdamW(torch.optim.AdamW):
    """AdamW in one fused kernel, on the shards of this rank as ordinary tensors. Betas are 0.9 and 0.999, eps is 1e-8.

    With sharded tensors (DTensor), the same kernel would cost more time on the host, and memory that grows with every
    step: the dispatcher of DTensor caches calls by their arguments, and learning rate and weight decay always change.

    Args:
        groups: parameter groups, see `parameter_groups`.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, lr=0.0, fused=True)
        # A float32 scalar on the device. If it is 1, `step` changes nothing; the host does not wait for it.
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(  # type: ignore[override]  # takes no closure
        self, watch: Callable[[list[Tensor]], AbstractContextManager[None]] = lambda weights: nullcontext()
    ) -> None:
        """Update all weights.

        Args:
            watch: called with the weights of each of several updates, float32 and of this rank. Its context encloses
                the update.
        """
        for group in self.param_groups:
            state: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *state)
            beta1, beta2 = group["betas"]
            params, grads, averages, square_averages, maxima, steps = map(local_tensors, state)
            for part in split(params, UPDATED_BYTES):
                with watch(params[part]):
                    adamw(
                        params[part], grads[part], averages[part], square_averages[part], maxima[part], steps[part],
                        fused=True, found_inf=self.found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
                        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                    )  # fmt: skip


def split(tensors: Sequence[Tensor], num_bytes: int) -> Iterator[slice]:
    """Split a list of tensors into parts of at most `num_bytes`, or of one tensor."""
    start = size = 0
    for index, tensor in enumerate(tensors):
        size += tensor.nbytes
        if size > num_bytes and index > start:
            yield slice(start, index)
            start, size = index, tensor.nbytes
    if tensors:
        yield slice(start, len(tensors))


def build_optimizer(modules: Iterable[nn.Module]) -> ShardedAdamW:
    """Build the optimizer for encoder, predictor and, if there is one, head."""
    return ShardedAdamW(parameter_groups(modules))


def set_schedules(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if group["decayed"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], loss: Tensor, num_copies: int = 1) -> Tensor:
    """Compute the norm of the whole gradient.

    The norm is not finite if a gradient or the loss of any rank is not, so that all ranks skip the same steps.

    Args:
        parameters: the parameters, sharded over the ranks of each of `num_copies` groups.
        loss: scalar loss of this rank.
        num_copies: number of groups of ranks. All of them have the same gradient.

    Returns:
        A float32 scalar on the device, equal on all ranks.
    """
    gradients = local_tensors(p.grad for p in parameters if p.grad is not None)
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    squares = squares + 0.0 * loss  # 0 * inf and 0 * nan are nan
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(squares)
    return (squares / num_copies).sqrt()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most `max_norm`. `norm` is the result of `gradient_norm`."""
    torch._foreach_mul_(local_tensors(p.grad for p in parameters if p.grad is not None), clipping_scale(norm, max_norm))


def clipping_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that `clip_gradients` multiplies gradients with: a scalar on the device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
