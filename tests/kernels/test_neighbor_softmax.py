"""aggregate_neighbors and pool_neighbors: every implementation against the reference, in values and gradients; misuse;
large offsets."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from dmtjepa.kernels import aggregate_neighbors, plain, pool_neighbors
from dmtjepa.kernels.aggregate_neighbors import aggregate_neighbors_op, aggregate_neighbors_reference
from dmtjepa.kernels.pool_neighbors import pool_neighbors_op, pool_neighbors_reference

SHAPES = [  # U, R, K, heads, head size
    (1, 1, 1, 1, 8),
    (7, 9, 4, 3, 24),
    (0, 5, 4, 2, 16),
    (5, 6, 8, 2, 32),
    pytest.param((18, 20, 4, 2, 64), marks=pytest.mark.slow),
    pytest.param((3, 40, 4, 5, 80), marks=pytest.mark.slow),
    pytest.param((17, 30, 2, 3, 88), marks=pytest.mark.slow),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw_for_aggregate(shape, dtype, device, index_dtype=torch.int64):
    """Arguments of aggregate_neighbors; the first patch has no neighbour at all."""
    num_covered, num_patches, k, num_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    dim = num_heads * head_dim
    neighbor_index = torch.randint(-1, num_patches, (num_covered, k), generator=generator)
    neighbor_index[:1] = -1
    own = [normal(num_covered, dim) for _ in range(3)]
    key, value = normal(num_patches, dim), normal(num_patches, dim)
    return *own, key, value, neighbor_index.to(device, index_dtype), num_heads


def draw_for_pool(shape, dtype, device, index_dtype=torch.int64):
    """Arguments of pool_neighbors for 3 images; the first patch has no neighbour at all."""
    num_covered, num_patches, k, num_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    dim, num_images = num_heads * head_dim, 3
    neighbor_index = torch.randint(-1, num_patches, (num_covered, k), generator=generator)
    neighbor_index[:1] = -1
    image_index = torch.randint(0, num_images, (num_covered,), generator=generator)
    indices = (index.to(device, index_dtype) for index in (neighbor_index, image_index))
    own = normal(num_images, num_heads), normal(num_images, dim)
    return *own, normal(num_patches, num_heads), normal(num_patches, dim), *indices


class Operator(NamedTuple):
    """An operator and what its tests need. `arguments` are the names of its arguments, of which the first
    `num_floats` are float tensors and `per_patch` are those with one row per covered patch."""

    function: Callable
    reference: Callable
    plain: Callable
    op: torch.library.CustomOpDef
    draw: Callable
    arguments: tuple[str, ...]
    num_floats: int
    per_patch: tuple[str, ...]


OPERATORS = {
    "aggregate": Operator(
        aggregate_neighbors,
        aggregate_neighbors_reference,
        plain.aggregate_neighbors,
        aggregate_neighbors_op,
        draw_for_aggregate,
        ("query", "self_key", "self_value", "key", "value", "neighbor_index", "num_heads"),
        num_floats=5,
        per_patch=("query", "self_key", "self_value", "neighbor_index"),
    ),
    "pool": Operator(
        pool_neighbors,
        pool_neighbors_reference,
        plain.pool_neighbors,
        pool_neighbors_op,
        draw_for_pool,
        ("self_score", "self_value", "score", "value", "neighbor_index", "image_index"),
        num_floats=4,
        per_patch=("neighbor_index", "image_index"),
    ),
}


@pytest.fixture(params=OPERATORS)
def operator(request) -> Operator:
    return OPERATORS[request.param]


def with_gradients(arguments):
    return [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(operator, device, shape, dtype, relative_error):
    arguments = operator.draw(shape, dtype, device, torch.int32 if dtype == torch.float16 else torch.int64)
    output = operator.function(*arguments)
    assert output.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(output, operator.reference(*arguments)) <= limit


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [*SHAPES[:2], *SHAPES[3:5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_reference(operator, device, shape, dtype, relative_error, gradients):
    arguments = operator.draw(shape, dtype, device)
    found = gradients(operator.function, arguments, dtype)
    expected = gradients(operator.reference, arguments, torch.float32)
    limit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, e) <= limit or float(e.norm()) < 1e-6  # the softmax of one score has no gradient


def test_gradients_of_some_arguments(operator, device):
    arguments = operator.draw((7, 9, 4, 3, 24), torch.float32, device)
    for place in range(operator.num_floats):
        leaves = [a.clone().requires_grad_() if i == place else a for i, a in enumerate(arguments)]
        (found,) = torch.autograd.grad(operator.function(*leaves).square().sum(), leaves[place])
        (expected,) = torch.autograd.grad(operator.plain(*leaves).square().sum(), leaves[place])
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("poisoned_memory")
def test_strides(operator, device, relative_error):
    arguments = operator.draw((7, 9, 4, 3, 24), torch.float32, device)

    def strided(place, argument):
        if not torch.is_tensor(argument) or argument.ndim == 1:
            return argument
        if place % 2:
            return argument.t().contiguous().t()
        return torch.cat([argument, argument], dim=1)[:, : argument.shape[1]]

    output = operator.function(*(strided(place, argument) for place, argument in enumerate(arguments)))
    assert relative_error(output, operator.reference(*arguments)) <= 1e-6


def test_large_scores(operator, device, relative_error):
    """Scores in the thousands: the maximum is subtracted before the exponential."""
    arguments = list(operator.draw((7, 9, 4, 3, 24), torch.float32, device))
    arguments[0] = arguments[0] * 3000
    arguments[2] = arguments[2] * 3000
    assert relative_error(operator.function(*arguments), operator.reference(*arguments)) <= 1e-5


def test_gradcheck(operator):
    arguments = tuple(with_gradients(operator.draw((5, 6, 3, 2, 8), torch.float64, "cpu")))
    for function in (operator.function, operator.plain):
        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.slow
def test_opcheck(operator, device):
    arguments = operator.draw((5, 6, 3, 2, 8), torch.float32, device)
    torch.library.opcheck(operator.op, tuple(with_gradients(arguments)))


@pytest.mark.slow
def test_fullgraph(operator, device):
    arguments = dict(zip(operator.arguments, operator.draw((18, 20, 4, 2, 64), torch.float32, device), strict=True))
    value = arguments.pop("value").requires_grad_()

    def step(value, per_patch):
        return operator.function(**arguments | per_patch, value=value).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_covered in (18, 11, 5):
        per_patch = {name: arguments[name][:num_covered] for name in operator.per_patch}
        (expected,) = torch.autograd.grad(step(value, per_patch), value)
        (found,) = torch.autograd.grad(compiled(value, per_patch), value)
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits(operator, device, relative_error):
    # Values 2**30 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    arguments = list(operator.draw((7, 3, 4, 2, 8), torch.bfloat16, device))
    expected = operator.reference(*arguments)
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    place = operator.arguments.index("value")
    arguments[place] = memory.as_strided((3, 16), (2**30, 1)).copy_(arguments[place])
    assert relative_error(operator.function(*arguments), expected) <= torch.finfo(torch.bfloat16).eps


AGGREGATE_MISUSES = [
    ("query", lambda t: t[0], ValueError, "query must have 2 dimensions"),
    ("query", lambda t: t.int(), TypeError, "query must be one of"),
    ("key", lambda t: t[:, :8], ValueError, r"key must have shape \[R, D\]"),
    ("value", lambda t: t[:3], ValueError, r"value must have shape \[R, D\]"),
    ("self_key", lambda t: t[:3], ValueError, r"self_key must have shape \[U, D\]"),
    ("self_value", lambda t: t.bfloat16(), TypeError, "self_value is torch.bfloat16 but query is torch.float32"),
    ("neighbor_index", lambda t: t.float(), TypeError, "neighbor_index must be one of"),
    ("neighbor_index", lambda t: t[:2], ValueError, r"neighbor_index must have shape \[U, K\]"),
    ("value", lambda t: t.to("meta"), ValueError, "value is on meta but query is on cpu"),
    ("num_heads", lambda n: 3, ValueError, "a width of 16 does not divide into 3 heads"),
    ("num_heads", lambda n: 4, ValueError, "multiple of 8"),
]
POOL_MISUSES = [
    ("score", lambda t: t[:3], ValueError, r"score must have shape \[R, H\]"),
    ("self_score", lambda t: t[:, :1], ValueError, r"self_score must have shape \[B, H\]"),
    ("self_score", lambda t: t.half(), TypeError, "self_score is torch.float16 but score is torch.float32"),
    ("self_value", lambda t: t[:2], ValueError, r"self_value must have shape \[B, D\]"),
    ("self_value", lambda t: t.half(), TypeError, "self_value is torch.float16 but value is torch.float32"),
    ("image_index", lambda t: t.float(), TypeError, "image_index must be one of"),
    ("image_index", lambda t: t[:2], ValueError, r"neighbor_index must have shape \[U, K\]"),
    ("image_index", lambda t: t.to("meta"), ValueError, "image_index is on meta but value is on cpu"),
]


@pytest.mark.parametrize(
    ("operator", "name", "change", "error", "message"),
    [*(("aggregate", *misuse) for misuse in AGGREGATE_MISUSES), *(("pool", *misuse) for misuse in POOL_MISUSES)],
    indirect=["operator"],
)
def test_misuse(operator, name, change, error, message):
    arguments = dict(zip(operator.arguments, operator.draw((5, 6, 3, 2, 8), torch.float32, "cpu"), strict=True))
    with pytest.raises(error, match=message):
        operator.function(**{**arguments, name: change(arguments[name])})


def test_index_out_of_range_in_debug_mode(operator, device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    arguments = dict(zip(operator.arguments, operator.draw((5, 6, 3, 2, 8), torch.float32, device), strict=True))
    arguments["neighbor_index"][2, 1] = 6
    with pytest.raises(IndexError, match=r"neighbor_index has entries in \[-1, 6\], outside \[-1, 5\]"):
        operator.function(**arguments)
    if "image_index" in arguments:
        arguments["neighbor_index"].fill_(0)
        arguments["image_index"][0] = 3
        with pytest.raises(IndexError, match=r"image_index has entries in \[\d, 3\], outside \[0, 2\]"):
            operator.function(**arguments)
