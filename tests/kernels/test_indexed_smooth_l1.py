"""indexed_smooth_l1: every implementation against the reference, in value and gradient."""

import pytest
import torch

from dmtjepa.kernels import indexed_smooth_l1, plain
from dmtjepa.kernels.indexed_smooth_l1 import (
    indexed_smooth_l1_backward_op,
    indexed_smooth_l1_op,
    indexed_smooth_l1_reference,
)

SHAPES = [  # B, M, T, D, U
    (1, 1, 1, 8, 1),
    (2, 4, 5, 24, 11),
    (3, 2, 7, 300, 30),
    (1, 4, 9, 192, 6),
]


def draw(shape, dtype, device, index_dtype=torch.int64):
    num_images, num_blocks, num_patches, dim, num_covered = shape
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(num_images, num_blocks, num_patches, dim, generator=generator).to(device, dtype)
    target = torch.randn(num_covered, dim, generator=generator).to(device, dtype)
    slot = torch.randint(0, num_covered, (num_images, num_blocks, num_patches), generator=generator)
    return prediction.requires_grad_(), target, slot.to(device, index_dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(device, shape, dtype, relative_error):
    prediction, target, slot = draw(shape, dtype, device, torch.int32 if dtype == torch.float16 else torch.int64)
    loss = indexed_smooth_l1(prediction, target, slot)
    assert loss.dtype == torch.float32
    wide = prediction.detach().float().requires_grad_()
    expected = indexed_smooth_l1_reference(wide, target, slot)
    assert relative_error(loss, expected) <= 1e-6

    # As accumulation over two micro-batches would: a gradient of the loss other than 1.
    (found,) = torch.autograd.grad(loss, prediction, torch.tensor(0.5, device=device))
    (grad,) = torch.autograd.grad(expected, wide, torch.tensor(0.5, device=device))
    assert found.dtype == dtype
    assert relative_error(found, grad) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poisoned_memory")
def test_strides_and_mixed_dtypes(device, relative_error):
    prediction, target, slot = draw((2, 4, 5, 24, 11), torch.bfloat16, device)
    target = torch.cat([target, target], dim=1)[:, :24].float()
    transposed = prediction.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    loss = indexed_smooth_l1(transposed, target, slot.transpose(0, 2).contiguous().transpose(0, 2))
    expected = indexed_smooth_l1_reference(prediction, target, slot)
    assert relative_error(loss, expected) <= 1e-6
    (found,), (grad,) = torch.autograd.grad(loss, transposed), torch.autograd.grad(expected, prediction)
    assert relative_error(found, grad) <= torch.finfo(torch.bfloat16).eps


def test_nothing_to_average(device):
    loss = indexed_smooth_l1(*draw((2, 4, 0, 24, 11), torch.float32, device))
    assert loss.shape == ()
    assert loss.isnan()


def test_not_a_number_is_not_hidden(device):
    prediction, target, slot = draw((2, 4, 5, 24, 11), torch.float32, device)
    target[int(slot[1, 2, 3]), 7] = float("nan")
    loss = indexed_smooth_l1(prediction, target, slot)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, prediction)
    assert grad[1, 2, 3, 7].isnan()


def test_gradcheck():
    arguments = draw((2, 2, 3, 8, 5), torch.float64, "cpu")
    for function in (indexed_smooth_l1, plain.indexed_smooth_l1):
        assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.slow
def test_opcheck(device):
    prediction, target, slot = draw((2, 4, 5, 24, 11), torch.float32, device)
    torch.library.opcheck(indexed_smooth_l1_op, (prediction, target, slot))
    grad = torch.ones((), device=device)
    torch.library.opcheck(indexed_smooth_l1_backward_op, (grad, prediction.detach(), target, slot))


@pytest.mark.slow
def test_fullgraph(device):
    prediction, target, slot = draw((2, 4, 5, 24, 11), torch.float32, device)

    def step(prediction, target, slot):
        return indexed_smooth_l1(prediction * 2, target, slot) * 3

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_patches in (5, 4, 2):
        at = (slice(None), slice(None), slice(num_patches))
        (expected,) = torch.autograd.grad(step(prediction[at], target, slot[at]), prediction)
        (found,) = torch.autograd.grad(compiled(prediction[at], target, slot[at]), prediction)
        torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits(device, relative_error):
    # Rows 2**30 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    prediction, target, slot = draw((1, 2, 5, 16, 3), torch.bfloat16, device)
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((3, 16), (2**30, 1))
    far.copy_(target)
    loss, expected = indexed_smooth_l1(prediction, far, slot), indexed_smooth_l1(prediction, target, slot)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(value, prediction)[0] for value in (loss, expected)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, t, s: (p[0], t, s), ValueError, "prediction must have 4 dimensions"),
        (lambda p, t, s: (p, t[:, :8], s), ValueError, r"target must have shape \[U, D\]"),
        (lambda p, t, s: (p, t, s[:1]), ValueError, r"slot must have shape \[B, M, T\]"),
        (lambda p, t, s: (p, t.int(), s), TypeError, "target must be one of"),
        (lambda p, t, s: (p, t, s.float()), TypeError, "slot must be one of"),
        (lambda p, t, s: (p, t.to("meta"), s), ValueError, "target is on meta but prediction is on cpu"),
        (lambda p, t, s: (p, t.requires_grad_(), s), ValueError, "target requires a gradient.*detach"),
    ],
)
def test_misuse(change, error, message):
    with pytest.raises(error, match=message):
        indexed_smooth_l1(*change(*draw((2, 4, 5, 24, 11), torch.float32, "cpu")))


def test_slot_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    prediction, target, slot = draw((2, 4, 5, 24, 11), torch.float32, device)
    slot[0, 0, 0] = 11
    with pytest.raises(IndexError, match=r"slot has entries in \[\d, 11\], outside \[0, 10\]"):
        indexed_smooth_l1(prediction, target, slot)
