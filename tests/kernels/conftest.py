"""Fixtures of the operator tests: the implementations that each test runs, poisoned memory, errors and gradients.

`cpu` is the CPU implementation. `interpreter` is the Triton kernels on CPU tensors, in Triton's interpreter, through
the same operators: their CPU implementations are switched off. `cuda` is the Triton kernels on a GPU.
"""

from contextlib import ExitStack

import pytest
import torch
import triton

from dmtjepa.kernels.aggregate_neighbors import aggregate_neighbors_op
from dmtjepa.kernels.embed_patches import embed_patches_op
from dmtjepa.kernels.gather_tokens import gather_tokens_op, scatter_tokens_op
from dmtjepa.kernels.indexed_smooth_l1 import indexed_smooth_l1_backward_op, indexed_smooth_l1_op
from dmtjepa.kernels.pool_neighbors import pool_neighbors_op
from dmtjepa.kernels.select_neighbors import select_neighbors_op

OPERATORS = (
    gather_tokens_op,
    scatter_tokens_op,
    embed_patches_op,
    select_neighbors_op,
    aggregate_neighbors_op,
    pool_neighbors_op,
    indexed_smooth_l1_op,
    indexed_smooth_l1_backward_op,
)


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of the tensors; the operators called during the test run the implementation of the parameter."""
    if request.param == "interpreter" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off, because there is a GPU or TRITON_INTERPRET=0")
    with ExitStack() as stack:
        if request.param == "interpreter":
            for operator in OPERATORS:
                stack.enter_context(operator.set_kernel_enabled("cpu", False))
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills memory that is handed out uninitialised with NaN, or with a number far out of range."""

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: poison(original(*a, **k)))


@pytest.fixture
def relative_error():
    """||output - reference|| / ||reference||, NaN where the output has one."""

    def error(output, reference):
        output, reference = output.detach().double().cpu(), reference.detach().double().cpu()
        assert output.shape == reference.shape
        return float((output - reference).norm() / reference.norm().clamp_min(1e-30))

    return error


@pytest.fixture
def gradients():
    """Gradients of a function's output in its floating-point arguments, for a gradient that grows from -1 to 1."""

    def compute(function, arguments, dtype):
        def is_float(argument):
            return torch.is_tensor(argument) and argument.is_floating_point()

        leaves = [a.detach().to(dtype).requires_grad_() if is_float(a) else a for a in arguments]
        output = function(*leaves)
        grad = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        inputs = [leaf for leaf in leaves if is_float(leaf)]
        # Rounded once in the dtype of the arguments, so that every dtype sees the same gradient.
        rounded = grad.to(next(a.dtype for a in arguments if is_float(a))).to(output.dtype)
        return torch.autograd.grad(output, inputs, rounded, materialize_grads=True)

    return compute
