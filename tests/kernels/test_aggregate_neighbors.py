"""aggregate_neighbors: every implementation against the reference, in values and gradients; misuse; large offsets."""

import pytest
import torch

from dmtjepa.kernels import aggregate_neighbors, plain
from dmtjepa.kernels.aggregate_neighbors import aggregate_neighbors_op, aggregate_neighbors_reference

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
NAMES = ("query", "self_key", "self_value", "key", "value", "neighbor_index", "num_heads")


def draw(shape, dtype, device, index_dtype=torch.int64):
    """Arguments of the operator; the first patch has no neighbour at all."""
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


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(device, shape, dtype, relative_error):
    arguments = draw(shape, dtype, device, torch.int32 if dtype == torch.float16 else torch.int64)
    output = aggregate_neighbors(*arguments)
    assert output.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(output, aggregate_neighbors_reference(*arguments)) <= limit


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [*SHAPES[:2], *SHAPES[3:5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_reference(device, shape, dtype, relative_error, gradients):
    arguments = draw(shape, dtype, device)
    found = gradients(aggregate_neighbors, arguments, dtype)
    expected = gradients(aggregate_neighbors_reference, arguments, torch.float32)
    limit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, e) <= limit or float(e.norm()) < 1e-6  # the softmax of one score has no gradient


def test_gradients_of_some_arguments(device):
    arguments = draw((7, 9, 4, 3, 24), torch.float32, device)
    for place in range(5):
        leaves = [a.clone().requires_grad_() if i == place else a for i, a in enumerate(arguments)]
        (found,) = torch.autograd.grad(aggregate_neighbors(*leaves).square().sum(), leaves[place])
        (expected,) = torch.autograd.grad(plain.aggregate_neighbors(*leaves).square().sum(), leaves[place])
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("poisoned_memory")
def test_strides(device, relative_error):
    arguments = draw((7, 9, 4, 3, 24), torch.float32, device)

    def strided(place, argument):
        if not torch.is_tensor(argument) or argument.ndim == 1:
            return argument
        if place % 2:
            return argument.t().contiguous().t()
        return torch.cat([argument, argument], dim=1)[:, : argument.shape[1]]

    output = aggregate_neighbors(*(strided(place, argument) for place, argument in enumerate(arguments)))
    assert relative_error(output, aggregate_neighbors_reference(*arguments)) <= 1e-6


def test_large_scores(device, relative_error):
    """Scores in the thousands: the maximum is subtracted before the exponential."""
    arguments = list(draw((7, 9, 4, 3, 24), torch.float32, device))
    arguments[0] = arguments[0] * 3000
    arguments[2] = arguments[2] * 3000
    assert relative_error(aggregate_neighbors(*arguments), aggregate_neighbors_reference(*arguments)) <= 1e-5


def test_gradcheck():
    arguments = draw((5, 6, 3, 2, 8), torch.float64, "cpu")
    leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    for function in (aggregate_neighbors, plain.aggregate_neighbors):
        assert torch.autograd.gradcheck(function, tuple(leaves), fast_mode=True)


@pytest.mark.slow
def test_opcheck(device):
    arguments = draw((5, 6, 3, 2, 8), torch.float32, device)
    leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    torch.library.opcheck(aggregate_neighbors_op, tuple(leaves))


@pytest.mark.slow
def test_fullgraph(device):
    query, self_key, self_value, key, value, neighbor_index, num_heads = draw((18, 20, 4, 2, 64), torch.float32, device)
    value.requires_grad_()

    def step(query, value):
        u = slice(0, query.shape[0])
        output = aggregate_neighbors(query, self_key[u], self_value[u], key, value, neighbor_index[u], num_heads)
        return output.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_covered in (18, 11, 5):
        (expected,) = torch.autograd.grad(step(query[:num_covered], value), value)
        (found,) = torch.autograd.grad(compiled(query[:num_covered], value), value)
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits(device, relative_error):
    # Values 2**30 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    arguments = list(draw((7, 3, 4, 2, 8), torch.bfloat16, device))
    expected = aggregate_neighbors_reference(*arguments)
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    place = NAMES.index("value")
    arguments[place] = memory.as_strided((3, 16), (2**30, 1)).copy_(arguments[place])
    assert relative_error(aggregate_neighbors(*arguments), expected) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
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
    ],
)
def test_misuse(name, change, error, message):
    arguments = dict(zip(NAMES, draw((5, 6, 3, 2, 8), torch.float32, "cpu"), strict=True))
    with pytest.raises(error, match=message):
        aggregate_neighbors(**{**arguments, name: change(arguments[name])})


def test_index_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    arguments = draw((5, 6, 3, 2, 8), torch.float32, device)
    arguments[5][2, 1] = 6
    with pytest.raises(IndexError, match=r"neighbor_index has entries in \[-1, 6\], outside \[-1, 5\]"):
        aggregate_neighbors(*arguments)
