"""Schedules, groups, norms and the skipped step."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dmtjepa.training.optimization import (
    Schedules,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    parameter_groups,
    set_schedules,
)

PUBLISHED = Schedules(
    steps_per_epoch=5004, num_epochs=600, warmup=40, start_lr=2e-4, lr=1e-3, final_lr=1e-6,
    weight_decay=0.04, final_weight_decay=0.4, ema=(0.996, 1.0),
)  # fmt: skip


def test_learning_rate_warms_up_then_follows_a_cosine():
    warmup_steps, last = 40 * 5004, 600 * 5004 - 1
    # The published scheduler advances before the update: the first step uses its value number 1, not start_lr.
    assert PUBLISHED.learning_rate(0) == pytest.approx(2e-4 + 8e-4 / warmup_steps, rel=1e-12)
    assert PUBLISHED.learning_rate(warmup_steps // 2 - 1) == pytest.approx(6e-4, rel=1e-12)
    assert PUBLISHED.learning_rate(warmup_steps - 1) == 1e-3
    middle = warmup_steps + (last + 1 - warmup_steps) // 2 - 1
    assert PUBLISHED.learning_rate(middle) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-9)
    assert PUBLISHED.learning_rate(last) == pytest.approx(1e-6, rel=1e-9)


def test_longer_schedule_ends_above_its_last_value():
    longer = Schedules(100, 10, 1, 0.0, 1.0, 0.0, 0.0, 1.0, (0.9, 1.0), ipe_scale=1.25)
    assert longer.learning_rate(999) == pytest.approx(0.5 * (1 + math.cos(math.pi * 900 / 1150)))
    assert longer.decay(999) == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi * 0.8)))
    assert longer.momentum(1000) == pytest.approx(0.98)


def test_shorter_schedule_stays_at_its_last_value():
    shorter = Schedules(100, 10, 0, 0.0, 1.0, 0.1, 0.0, 1.0, (0.9, 1.0), ipe_scale=0.5)
    assert shorter.learning_rate(499) == shorter.learning_rate(999) == pytest.approx(0.1)
    assert shorter.decay(700) == 1.0
    assert shorter.momentum(700) == 1.0


def test_weight_decay_and_momentum_of_the_published_run():
    last = 600 * 5004 - 1
    assert PUBLISHED.decay(0) == pytest.approx(0.04, abs=1e-9)
    assert PUBLISHED.decay(last) == pytest.approx(0.4, rel=1e-12)
    assert PUBLISHED.momentum(0) == 0.996  # the momentum advances after the update: its first value is used
    assert PUBLISHED.momentum(300 * 5004) == pytest.approx(0.998, rel=1e-12)


def test_groups_stand_in_the_published_order_and_spare_biases_and_norms():
    modules = [nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)) for _ in range(3)]
    groups = parameter_groups(modules)
    assert [group["decayed"] for group in groups] == [True, True, False, False, True, False]
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [2], [1] * 3, [1] * 3, [2], [1] * 3]
    assert groups[1]["params"][0] is modules[1][0].weight
    optimizer = build_optimizer(modules)
    set_schedules(optimizer, 0.5, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0, 0.0, 0.25, 0.0]


@pytest.fixture
def _alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_norm_and_clipping_are_those_of_torch():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(n, 3)) for n in (1, 4, 7)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = gradient_norm(ours, torch.tensor(1.0))
    expected = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, expected)
    clip_gradients(ours, norm, 0.5)
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
