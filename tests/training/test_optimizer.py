"""Parameter groups, norm and clipping of the gradient, and the skipped step."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dmtjepa.training import optimizer as optimizer_module
from dmtjepa.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    parameter_groups,
    set_schedules,
)


def test_groups_have_the_official_order_and_do_not_decay_biases_and_norms():
    modules = [nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)) for _ in range(3)]
    groups = parameter_groups(modules)
    assert [group["decayed"] for group in groups] == [True, True, False, False, True, False]
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [2], [1] * 3, [1] * 3, [2], [1] * 3]
    assert groups[1]["params"][0] is modules[1][0].weight
    optimizer = build_optimizer(modules)
    set_schedules(optimizer, 0.5, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0, 0.0, 0.25, 0.0]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_norm_and_clipping_are_those_of_torch(max_norm):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(n, 3)) for n in (1, 4, 7)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = gradient_norm(ours, torch.tensor(1.0))
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    clip_gradients(ours, norm, max_norm)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("loss", "gradient"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_norm_is_not_finite_where_loss_or_gradient_is_not(loss, gradient):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, gradient])
    assert not gradient_norm([parameter], torch.tensor(loss)).isfinite()


def test_step_with_found_inf_changes_nothing():
    module = nn.Linear(3, 3)
    optimizer = build_optimizer([module])
    set_schedules(optimizer, 0.1, 0.1)
    before = module.weight.clone()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(module.weight, before, rtol=0, atol=0)
    assert optimizer.state[module.weight]["step"] == 0
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("num_bytes", [1, 100, 2**28])
def test_weights_are_updated_in_parts_of_limited_size(monkeypatch, num_bytes):
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(3, n) for n in (5, 3, 7)))
    parts = copy.deepcopy(whole)
    watched = []

    @contextmanager
    def watch(weights):
        before = [weight.clone() for weight in weights]
        yield
        assert all(not torch.equal(new, old) for new, old in zip(weights, before, strict=True))
        assert sum(weight.nbytes for weight in weights) <= num_bytes or len(weights) == 1
        watched.extend(weights)

    monkeypatch.setattr(optimizer_module, "UPDATED_BYTES", num_bytes)
    ours, theirs = build_optimizer([parts]), torch.optim.AdamW(whole.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    set_schedules(ours, 0.1, 0.0)
    for _ in range(3):
        for parameter, other in zip(parts.parameters(), whole.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        ours.step(watch)
        theirs.step()
    assert sorted(map(torch.Tensor.data_ptr, watched)) == sorted(3 * [p.data_ptr() for p in parts.parameters()])
    for parameter, other in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)
