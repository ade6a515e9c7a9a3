"""aggregate_neighbors and pool_neighbors: every implementation against the reference, in values and gradients."""

import pytest
import torch

from dmtjepa.kernels import aggregate_neighbors, plain, pool_neighbors
from dmtjepa.kernels.aggregate_neighbors import (
    aggregate_neighbors_op,
    aggregate_neighbors_reference,
    pool_neighbors_op,
    pool_neighbors_reference,
)

SHAPES = [  # U, R, K, heads, head size
    (1, 1, 1, 1, 8),
    (7, 9, 4, 3, 24),
    (5, 6, 8, 2, 32),
    (18, 20, 4, 2, 64),
    (3, 40, 4, 5, 80),
    (17, 30, 2, 3, 88),
    (0, 5, 4, 2, 16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, device, index_dtype=torch.int64):
    """Arguments of aggregate_neighbors and of pool_neighbors; the first patch has no neighbour at all."""
    num_covered, num_rows, k, num_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    dim, num_images = num_heads * head_dim, 3
    neighbor_index = torch.randint(-1, num_rows, (num_covered, k), generator=generator)
    neighbor_index[:1] = -1
    neighbor_index = neighbor_index.to(device, index_dtype)
    image_index = torch.randint(0, num_images, (num_covered,), generator=generator).to(device, index_dtype)
    own = [normal(num_covered, dim) for _ in range(3)]
    key, value = normal(num_rows, dim), normal(num_rows, dim)
    aggregate = (*own, key, value, neighbor_index, num_heads)
    scores = normal(num_images, num_heads), normal(num_rows, num_heads)
    pool = (scores[0], normal(num_images, dim), scores[1], value, neighbor_index, image_index)
    return aggregate, pool


FUNCTIONS = {
    "aggregate": (aggregate_neighbors, aggregate_neighbors_reference, 0),
    "pool": (pool_neighbors, pool_neighbors_reference, 1),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(device, name, shape, dtype, relative_error):
    function, reference, which = FUNCTIONS[name]
    arguments = draw(shape, dtype, device, torch.int32 if dtype == torch.float16 else torch.int64)[which]
    output = function(*arguments)
    assert output.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(output, reference(*arguments)) <= limit


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_reference(device, name, shape, dtype, relative_error):
    function, reference, which = FUNCTIONS[name]
    arguments = draw(shape, dtype, device)[which]

    def gradients(function, convert):
        leaves = [convert(a).requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
        output = function(*leaves)
        grad = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape)
        inputs = [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad]
        return torch.autograd.grad(output, inputs, grad.to(dtype).to(output.dtype), materialize_grads=True)

    found = gradients(function, lambda tensor: tensor.clone())
    expected = gradients(reference, lambda tensor: tensor.float())
    limit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, e) <= limit or float(e.norm()) < 1e-6  # one score has no gradient


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides(device, name, relative_error):
    function, reference, which = FUNCTIONS[name]
    arguments = draw((7, 9, 4, 3, 24), torch.float32, device)[which]

    def strided(position, argument):
        if not torch.is_tensor(argument) or argument.ndim == 1:
            return argument
        if position % 2:
            return argument.t().contiguous().t()
        return torch.cat([argument, argument], dim=1)[:, : argument.shape[1]]

    output = function(*(strided(position, argument) for position, argument in enumerate(arguments)))
    assert relative_error(output, reference(*arguments)) <= 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_scores(device, name, relative_error):
    """Scores in the thousands: the maximum is subtracted before the exponential."""
    function, reference, which = FUNCTIONS[name]
    arguments = list(draw((7, 9, 4, 3, 24), torch.float32, device)[which])
    arguments[0] = arguments[0] * 3000
    arguments[2] = arguments[2] * 3000
    assert relative_error(function(*arguments), reference(*arguments)) <= 1e-5


def test_gradcheck():
    aggregate, pool = draw((5, 6, 3, 2, 8), torch.float64, "cpu")
    for module_function, arguments in (
        (aggregate_neighbors, aggregate),
        (plain.aggregate_neighbors, aggregate),
        (pool_neighbors, pool),
        (plain.pool_neighbors, pool),
    ):
        leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
        assert torch.autograd.gradcheck(module_function, tuple(leaves), fast_mode=True)


def test_opcheck(device):
    aggregate, pool = draw((5, 6, 3, 2, 8), torch.float32, device)
    for operator, arguments in ((aggregate_neighbors_op, aggregate), (pool_neighbors_op, pool)):
        leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
        torch.library.opcheck(operator, tuple(leaves))


def test_fullgraph(device):
    aggregate, _ = draw((18, 20, 4, 2, 64), torch.float32, device)
    query, self_key, self_value, key, value, neighbor_index, num_heads = aggregate
    image_index = torch.arange(18, device=device) % 3
    value.requires_grad_()

    def step(query, value, image_index):
        at = slice(0, query.shape[0])
        first = pool_neighbors(key[:3, :2], value[:3], key[:, :2], value, neighbor_index[at], image_index)
        second = aggregate_neighbors(query, self_key[at], self_value[at], key, value, neighbor_index[at], num_heads)
        return (first + second).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_covered in (18, 11, 5):
        arguments = query[:num_covered], value, image_index[:num_covered]
        (expected,) = torch.autograd.grad(step(*arguments), value)
        (found,) = torch.autograd.grad(compiled(*arguments), value)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_offsets_beyond_32_bits(device, name, relative_error):
    # Rows 2**30 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    function, reference, which = FUNCTIONS[name]
    arguments = list(draw((7, 3, 4, 2, 8), torch.bfloat16, device)[which])
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    value = memory.as_strided((3, 16), (2**30, 1))
    place = 4 if name == "aggregate" else 3
    value.copy_(arguments[place])
    expected = reference(*arguments)
    arguments[place] = value
    assert relative_error(function(*arguments), expected) <= torch.finfo(torch.bfloat16).eps


AGGREGATE_NAMES = ("query", "self_key", "self_value", "key", "value", "neighbor_index", "num_heads")
POOL_NAMES = ("self_score", "self_value", "score", "value", "neighbor_index", "image_index")


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
def test_misuse_of_aggregate(name, change, error, message):
    arguments = dict(zip(AGGREGATE_NAMES, draw((5, 6, 3, 2, 8), torch.float32, "cpu")[0], strict=True))
    with pytest.raises(error, match=message):
        aggregate_neighbors(**{**arguments, name: change(arguments[name])})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("score", lambda t: t[:3], ValueError, r"score must have shape \[R, H\]"),
        ("self_score", lambda t: t[:, :1], ValueError, r"self_score must have shape \[B, H\]"),
        ("self_score", lambda t: t.half(), TypeError, "self_score is torch.float16 but score is torch.float32"),
        ("self_value", lambda t: t[:2], ValueError, r"self_value must have shape \[B, D\]"),
        ("image_index", lambda t: t.float(), TypeError, "image_index must be one of"),
        ("image_index", lambda t: t[:2], ValueError, r"neighbor_index must have shape \[U, K\]"),
        ("image_index", lambda t: t.to("meta"), ValueError, "image_index is on meta but value is on cpu"),
    ],
)
def test_misuse_of_pool(name, change, error, message):
    arguments = dict(zip(POOL_NAMES, draw((5, 6, 3, 2, 8), torch.float32, "cpu")[1], strict=True))
    with pytest.raises(error, match=message):
        pool_neighbors(**{**arguments, name: change(arguments[name])})


def test_index_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    aggregate, pool = draw((5, 6, 3, 2, 8), torch.float32, device)
    aggregate[5][2, 1] = 6
    with pytest.raises(IndexError, match=r"neighbor_index has entries in \[-1, 6\], outside \[-1, 5\]"):
        aggregate_neighbors(*aggregate)
    pool[4].fill_(0)
    pool[5][0] = 3
    with pytest.raises(IndexError, match=r"image_index has entries in \[\d, 3\], outside \[0, 2\]"):
        pool_neighbors(*pool)
