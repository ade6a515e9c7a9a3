"""Learning rate, weight decay and momentum at each step."""

import math

import pytest

from dmtjepa.training.schedules import Schedules

OFFICIAL = Schedules(
    steps_per_epoch=5004, num_epochs=600, warmup=40, start_lr=2e-4, lr=1e-3, final_lr=1e-6,
    weight_decay=0.04, final_weight_decay=0.4, ema=(0.996, 1.0),
)  # fmt: skip


def test_learning_rate_warms_up_then_follows_a_cosine():
    warmup_steps, last = 40 * 5004, 600 * 5004 - 1
    # The official scheduler advances before the update: the first step uses its value number 1, not start_lr.
    assert OFFICIAL.learning_rate(0) == pytest.approx(2e-4 + 8e-4 / warmup_steps, rel=1e-12)
    assert OFFICIAL.learning_rate(warmup_steps // 2 - 1) == pytest.approx(6e-4, rel=1e-12)
    assert OFFICIAL.learning_rate(warmup_steps - 1) == 1e-3
    middle = warmup_steps + (last + 1 - warmup_steps) // 2 - 1
    assert OFFICIAL.learning_rate(middle) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-9)
    assert OFFICIAL.learning_rate(last) == pytest.approx(1e-6, rel=1e-9)


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


def test_weight_decay_and_momentum_of_the_official_run():
    last = 600 * 5004 - 1
    assert OFFICIAL.decay(0) == pytest.approx(0.04, abs=1e-9)
    assert OFFICIAL.decay(last) == pytest.approx(0.4, rel=1e-12)
    assert OFFICIAL.momentum(0) == 0.996  # the momentum advances after the update: its first value is used
    assert OFFICIAL.momentum(300 * 5004) == pytest.approx(0.998, rel=1e-12)
