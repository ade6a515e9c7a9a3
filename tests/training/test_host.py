"""The host never waits for the device between two logged steps; shown without a device, by what would make it wait."""

import contextlib
import gc
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.training import instruments
from dmtjepa.training.launch import launch
from dmtjepa.training.metrics import Metrics
from dmtjepa.training.step import TrainStep


class HostWaits(AssertionError):
    pass


class _NoReads(TorchFunctionMode):
    """Python asks for a value."""

    names = frozenset({"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"})

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in self.names:
            raise HostWaits(f"Tensor.{function.__name__}")
        return function(*arguments, **(keywords or {}))


class _NoUnknownSizes(TorchDispatchMode):
    """An operator asks for a value, or its output's size depends on one."""

    names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        if name.startswith(self.names):
            raise HostWaits(name)
        if name.startswith("aten::index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in (arguments[1] if isinstance(arguments[1], (list, tuple)) else ())
        ):
            raise HostWaits(f"{name} with a mask")
        if name.startswith("dmtjepa::"):  # the operator of a CPU may read values; that of CUDA is shown by test_gpu.py
            with torch._C.DisableTorchFunction():
                return function(*arguments, **(keywords or {}))
        return function(*arguments, **(keywords or {}))


@contextlib.contextmanager
def host_must_not_wait():
    with _NoReads(), _NoUnknownSizes():
        yield


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "comparison": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    # The assignment of a number is a masked_fill_ in newer versions of PyTorch, which does not wait.
    "mask assignment": lambda x: x.clone().__setitem__(x > 0, torch.ones(1)),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_would_wait_is_noticed(name):
    with pytest.raises(HostWaits), host_must_not_wait():
        WAITS[name](torch.ones(3))


@pytest.mark.slow
def test_a_step_that_reads_its_loss_is_noticed(settings, monkeypatch):
    loss, original = DMTJEPA.loss, TrainStep.__call__

    def read_loss(*arguments):
        value = loss(*arguments)
        assert value.item() >= 0
        return value

    def watched_step(*arguments):
        with host_must_not_wait():
            return original(*arguments)

    monkeypatch.setattr(DMTJEPA, "loss", read_loss)
    monkeypatch.setattr(TrainStep, "__call__", watched_step)
    with pytest.raises(HostWaits, match="item"):
        launch(settings(), ["cpu"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow, id=str(changes))
            for changes in (
                {"patch.local_agg_head": False},
                {"optimization.clip_grad": 1.0},
                {"mask.pack": True},
                {"mask.pack": True, "optimization.context_loss": 0.5},
                {"runtime.teacher_precision": "fp8"},
            )
        ),
    ],
    ids=str,
)
def test_no_step_reads_a_value(settings, losses, monkeypatch, changes):
    num_steps = 0
    train_step, record = TrainStep.__call__, Metrics.record

    def watched_step(*arguments):
        nonlocal num_steps
        num_steps += 1
        with host_must_not_wait():
            return train_step(*arguments)

    def watched_record(*arguments):
        with host_must_not_wait():
            return record(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", watched_step)
    monkeypatch.setattr(Metrics, "record", watched_record)
    monkeypatch.setattr(instruments, "LOOK_EVERY", 3)  # at each logged step
    config = settings(**changes)
    assert launch(config, ["cpu"]) == 0
    assert num_steps == len(losses(config)) > 0
    assert all(map(math.isfinite, losses(config)))


@pytest.mark.slow
def test_memory_of_the_host_does_not_grow_with_the_steps(settings, losses, monkeypatch):
    """Learning rate and weight decay differ at every step: nothing may be remembered by them."""
    original, counts = TrainStep.__call__, []

    def counted_step(*arguments):
        gc.collect()
        counts.append(len(gc.get_objects()))
        return original(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", counted_step)
    # Nothing is saved meanwhile: the thread that writes holds objects as long as the machine makes it wait.
    config = settings(**{"optimization.epochs": 4, "runtime.log_every": 1, "runtime.save_every_epochs": 4})
    gc.collect()
    gc.freeze()  # what exists already is not counted: each look at all of it takes a second
    try:
        assert launch(config, ["cpu"]) == 0
    finally:
        gc.unfreeze()
    half = len(counts) // 2
    num_parameters = sum(1 for _ in build_model(config).parameters())
    assert counts[-1] - counts[half] < num_parameters  # less than one object per parameter in all these steps
