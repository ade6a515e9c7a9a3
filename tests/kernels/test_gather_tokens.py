"""gather_tokens: every implementation against the reference, in values and gradients; misuse; offsets beyond 2**31."""

import pytest
import torch

from dmtjepa.kernels import gather_tokens, plain
from dmtjepa.kernels.gather_tokens import gather_tokens_op, gather_tokens_reference, scatter_tokens_op

SHAPES = [  # B, N, K, D
    (1, 1, 1, 8),
    (1, 9, 4, 24),
    (3, 20, 7, 130),
    pytest.param((2, 36, 36, 192), marks=pytest.mark.slow),
    (2, 9, 0, 16),
    pytest.param((5, 50, 33, 88), marks=pytest.mark.slow),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, device, index_dtype=torch.int64, unique=True):
    num_images, num_patches, num_kept, dim = shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_images, num_patches, dim, generator=generator).to(device, dtype)
    if unique:
        index = torch.rand(num_images, num_patches, generator=generator).argsort(1)[:, :num_kept]
    else:
        index = torch.randint(0, num_patches, (num_images, num_kept), generator=generator)
    return tokens, index.to(device, index_dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique", [True, False], ids=["unique", "repeated"])
def test_equals_reference(device, shape, dtype, unique):
    tokens, index = draw(shape, dtype, device, torch.int32 if unique else torch.int64, unique)
    output = gather_tokens(tokens, index)
    assert output.dtype == dtype
    assert torch.equal(output, gather_tokens_reference(tokens, index))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("unique", [True, False], ids=["unique", "repeated"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_reference(device, shape, dtype, unique, relative_error):
    tokens, index = draw(shape, dtype, device, unique=unique)
    tokens.requires_grad_()
    grad = torch.randn(*index.shape, shape[3], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    (found,) = torch.autograd.grad(gather_tokens(tokens, index), tokens, grad)
    wide = tokens.detach().float().requires_grad_()
    reference = gather_tokens_reference(wide, index) + 0 * wide.sum()  # the gradient of no token at all is 0
    (expected,) = torch.autograd.grad(reference, wide, grad.float())
    assert found.dtype == dtype
    assert relative_error(found, expected) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(device, layout, relative_error):
    tokens, index = draw((3, 20, 7, 24), torch.float32, device)
    wide = torch.randn(3, 20, 48, device=device)
    tokens = {
        "transposed": tokens.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": wide[:, :, 8:32],
        "expanded": tokens[:1].expand(3, -1, -1),
    }[layout].requires_grad_()
    index = torch.stack([index, index], 2)[:, :, 1]
    output = gather_tokens(tokens, index)
    reference = gather_tokens_reference(tokens, index)
    assert torch.equal(output, reference)
    grad = torch.randn(3, 7, 1, device=device).expand_as(output)
    (found,) = torch.autograd.grad(output, tokens, grad)
    (expected,) = torch.autograd.grad(reference, tokens, grad)
    assert relative_error(found, expected) <= 1e-6


def test_gradcheck():
    tokens, index = draw((2, 6, 4, 3), torch.float64, "cpu", unique=False)
    for function in (gather_tokens, plain.gather_tokens):
        assert torch.autograd.gradcheck(function, (tokens.requires_grad_(), index))


@pytest.mark.slow
def test_opcheck(device):
    tokens, index = draw((2, 6, 4, 16), torch.float32, device)
    torch.library.opcheck(gather_tokens_op, (tokens.requires_grad_(), index))
    torch.library.opcheck(scatter_tokens_op, (torch.randn(2, 4, 16, device=device), index, 6))


@pytest.mark.slow
def test_fullgraph(device):
    tokens, index = draw((2, 6, 4, 16), torch.float32, device)
    tokens.requires_grad_()

    def step(tokens, index):
        return (gather_tokens(tokens * 2, index) ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_kept in (4, 3, 2):
        expected = torch.autograd.grad(step(tokens, index[:, :num_kept]), tokens)[0]
        found = torch.autograd.grad(compiled(tokens, index[:, :num_kept]), tokens)[0]
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits(device):
    # 2**31 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    memory = torch.empty(2**31 + 2 * 16, dtype=torch.bfloat16, device=device)
    tokens = memory.as_strided((3, 2, 16), (2**30, 16, 1))
    tokens.copy_(torch.arange(96).view(3, 2, 16))
    index = torch.tensor([[1], [0], [1]], device=device)
    assert torch.equal(gather_tokens(tokens, index)[:, 0, 0].float().cpu(), torch.tensor([16.0, 32.0, 80.0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, i: (t[0], i), ValueError, "tokens must have 3 dimensions"),
        (lambda t, i: (t.int(), i), TypeError, "tokens must be one of"),
        (lambda t, i: (t, i.float()), TypeError, "index must be one of int32, int64"),
        (lambda t, i: (t, i[:1]), ValueError, "index has 1 rows but tokens has 2 images"),
        (lambda t, i: (t, i.to("meta")), ValueError, "index is on meta but tokens is on cpu"),
    ],
)
def test_misuse(change, error, message):
    with pytest.raises(error, match=message):
        gather_tokens(*change(*draw((2, 6, 4, 8), torch.float32, "cpu")))


def test_index_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    tokens, index = draw((2, 6, 4, 8), torch.float32, device)
    index[1, 2] = 6
    with pytest.raises(IndexError, match=r"index has entries in \[\d, 6\], outside \[0, 5\]"):
        gather_tokens(tokens, index)
