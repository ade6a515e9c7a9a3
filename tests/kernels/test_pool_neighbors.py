"""pool_neighbors: every implementation against the reference, in values and gradients; misuse; large offsets."""

import pytest
import torch

from dmtjepa.kernels import plain, pool_neighbors
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
NAMES = ("self_score", "self_value", "score", "value", "neighbor_index", "image_index")


def draw(shape, dtype, device, index_dtype=torch.int64):
    """Arguments of the operator for 3 images; the first patch has no neighbour at all."""
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


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(device, shape, dtype, relative_error):
    arguments = draw(shape, dtype, device, torch.int32 if dtype == torch.float16 else torch.int64)
    output = pool_neighbors(*arguments)
    assert output.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(output, pool_neighbors_reference(*arguments)) <= limit


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [*SHAPES[:2], *SHAPES[3:5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_reference(device, shape, dtype, relative_error, gradients):
    arguments = draw(shape, dtype, device)
    found = gradients(pool_neighbors, arguments, dtype)
    expected = gradients(pool_neighbors_reference, arguments, torch.float32)
    limit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, e) <= limit or float(e.norm()) < 1e-6  # the softmax of one score has no gradient


def test_gradients_of_some_arguments(device):
    arguments = draw((7, 9, 4, 3, 24), torch.float32, device)
    for place in range(4):
        leaves = [a.clone().requires_grad_() if i == place else a for i, a in enumerate(arguments)]
        (found,) = torch.autograd.grad(pool_neighbors(*leaves).square().sum(), leaves[place])
        (expected,) = torch.autograd.grad(plain.pool_neighbors(*leaves).square().sum(), leaves[place])
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

    output = pool_neighbors(*(strided(place, argument) for place, argument in enumerate(arguments)))
    assert relative_error(output, pool_neighbors_reference(*arguments)) <= 1e-6


def test_large_scores(device, relative_error):
    """Scores in the thousands: the maximum is subtracted before the exponential."""
    arguments = list(draw((7, 9, 4, 3, 24), torch.float32, device))
    arguments[0] = arguments[0] * 3000
    arguments[2] = arguments[2] * 3000
    assert relative_error(pool_neighbors(*arguments), pool_neighbors_reference(*arguments)) <= 1e-5


def test_gradcheck():
    arguments = draw((5, 6, 3, 2, 8), torch.float64, "cpu")
    leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    for function in (pool_neighbors, plain.pool_neighbors):
        assert torch.autograd.gradcheck(function, tuple(leaves), fast_mode=True)


@pytest.mark.slow
def test_opcheck(device):
    arguments = draw((5, 6, 3, 2, 8), torch.float32, device)
    leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    torch.library.opcheck(pool_neighbors_op, tuple(leaves))


@pytest.mark.slow
def test_fullgraph(device):
    self_score, self_value, score, value, neighbor_index, image_index = draw((18, 20, 4, 2, 64), torch.float32, device)
    value.requires_grad_()

    def step(value, image_index):
        index = neighbor_index[: image_index.shape[0]]
        return pool_neighbors(self_score, self_value, score, value, index, image_index).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_covered in (18, 11, 5):
        (expected,) = torch.autograd.grad(step(value, image_index[:num_covered]), value)
        (found,) = torch.autograd.grad(compiled(value, image_index[:num_covered]), value)
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits(device, relative_error):
    # Values 2**30 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    arguments = list(draw((7, 3, 4, 2, 8), torch.bfloat16, device))
    expected = pool_neighbors_reference(*arguments)
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    place = NAMES.index("value")
    arguments[place] = memory.as_strided((3, 16), (2**30, 1)).copy_(arguments[place])
    assert relative_error(pool_neighbors(*arguments), expected) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("score", lambda t: t[:3], ValueError, r"score must have shape \[R, H\]"),
        ("self_score", lambda t: t[:, :1], ValueError, r"self_score must have shape \[B, H\]"),
        ("self_score", lambda t: t.half(), TypeError, "self_score is torch.float16 but score is torch.float32"),
        ("self_value", lambda t: t[:2], ValueError, r"self_value must have shape \[B, D\]"),
        ("self_value", lambda t: t.half(), TypeError, "self_value is torch.float16 but value is torch.float32"),
        ("image_index", lambda t: t.float(), TypeError, "image_index must be one of"),
        ("image_index", lambda t: t[:2], ValueError, r"neighbor_index must have shape \[U, K\]"),
        ("image_index", lambda t: t.to("meta"), ValueError, "image_index is on meta but value is on cpu"),
    ],
)
def test_misuse(name, change, error, message):
    arguments = dict(zip(NAMES, draw((5, 6, 3, 2, 8), torch.float32, "cpu"), strict=True))
    with pytest.raises(error, match=message):
        pool_neighbors(**{**arguments, name: change(arguments[name])})


def test_index_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    arguments = draw((5, 6, 3, 2, 8), torch.float32, device)
    arguments[4][2, 1] = 6
    with pytest.raises(IndexError, match=r"neighbor_index has entries in \[-1, 6\], outside \[-1, 5\]"):
        pool_neighbors(*arguments)
    arguments[4].fill_(0)
    arguments[5][0] = 3
    with pytest.raises(IndexError, match=r"image_index has entries in \[\d, 3\], outside \[0, 2\]"):
        pool_neighbors(*arguments)
