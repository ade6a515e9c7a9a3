"""update_weights against PyTorch's AdamW, `lerp` and copies, one after the other."""

import copy

import pytest
import torch
import triton

from dmtjepa.kernels.update_weights import (
    Weight,
    WeightTable,
    launch_update_weights,
    update_weights,
    update_weights_cpu,
    update_weights_reference,
)

# Shape, whether it is decayed, trained, has a teacher, has a gradient. More than a chunk of 4096; less than a block.
KINDS = [
    ((97, 61), True, True, True, True),
    ((4096,), False, True, True, True),
    ((3, 5), True, True, False, True),  # as in the predictor
    ((1,), False, True, True, False),
    ((0, 4), True, True, True, True),  # the shard of a rank that has none
    ((77,), False, False, True, False),  # a position embedding
]


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def update(request):
    if request.param == "interpreter" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off, because there is a GPU or TRITON_INTERPRET=0")
    functions = {"cpu": update_weights_cpu, "interpreter": launch_update_weights, "cuda": update_weights}
    torch.manual_seed(0)
    with torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield functions[request.param]


def draw_weights(copy_dtype, offset=0):
    """Weights and gradients; those of an odd `offset` are not aligned to 16 bytes."""

    def draw(shape, dtype=torch.float32):
        numel = torch.Size(shape).numel()
        return torch.randn(numel + offset).to(dtype)[offset:].view(shape)

    weights, gradients = [], []
    for shape, decayed, trained, taught, present in KINDS:
        averages = (draw(shape), draw(shape).square() + 0.1) if trained else (None, None)
        teacher = draw(shape) if taught else None
        copies = [draw(shape, copy_dtype), draw(shape, copy_dtype) if taught else None]
        weights.append(Weight(draw(shape), *averages, decayed, teacher, *(copies if copy_dtype else (None, None))))
        gradients.append(draw(shape) if present else None)
    return weights, gradients


def update_separately(weights, gradients, rate, decay, share, count, scale, found_inf):
    for w, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            parameter = torch.nn.Parameter(w.weight)
            parameter.grad = gradient * scale
            adamw = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay if w.decayed else 0.0, fused=True)
            step = torch.tensor(float(count - 1))
            adamw.state[parameter] = {"step": step, "exp_avg": w.average, "exp_avg_sq": w.square_average}
            adamw.found_inf = torch.tensor(found_inf)
            adamw.step()
        if w.teacher is not None:
            w.teacher.lerp_(w.weight, share)
        for copied, new in ((w.copy, w.weight), (w.teacher_copy, w.teacher)):
            if copied is not None:
                copied.copy_(new)


def assert_same(weights, expected, **tolerance):
    for number, (w, other) in enumerate(zip(weights, expected, strict=True)):
        for place, (value, target) in enumerate(zip(w.tensors(), other.tensors(), strict=True)):
            if value is not None:
                limits = {"rtol": 2**-7, "atol": 1e-5} if value.dtype == torch.bfloat16 else tolerance
                message = f"tensor {place} of weight {number}"
                torch.testing.assert_close(value, target, msg=lambda text, m=message: f"{m}: {text}", **limits)


@pytest.mark.parametrize(("copy_dtype", "offset"), [(torch.bfloat16, 0), (torch.float32, 1), (None, 0)])
def test_is_the_three_updates_one_after_the_other(update, copy_dtype, offset):
    weights, gradients = draw_weights(copy_dtype or torch.bfloat16, offset)
    if copy_dtype is None:
        weights = [Weight(*w.tensors()[:3], w.decayed, w.teacher) for w in weights]
    expected = copy.deepcopy(weights)
    table = WeightTable(weights)
    for count, scale, found_inf, share in ((1, 0.25, 0.0, 0.004), (2, 1.0, 1.0, 0.1), (2, 1.0, 0.0, 0.75)):
        given = [None if g is None else g * (torch.inf if found_inf else 1.0) for g in gradients]
        table.set_gradients(given)
        schedule = torch.tensor([0.1, 0.05, share], dtype=torch.float64)
        scalars = (torch.tensor(float(count)), torch.tensor(scale), torch.tensor(found_inf))
        for part in (slice(2), slice(2, None)) if count == 1 else (None,):
            update(table, schedule, *scalars, part)
        update_separately(expected, given, 0.1, 0.05, share, count, scale, found_inf)
        assert_same(weights, expected, rtol=1e-5, atol=5e-6)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_reference_is_the_definition(update):
    weights, gradients = draw_weights(torch.bfloat16)
    scalars = (torch.tensor([0.1, 0.05, 0.1], dtype=torch.float64), *map(torch.tensor, (3.0, 0.5, 0.0)))
    expected = [update_weights_reference(w, g, *scalars) for w, g in zip(weights, gradients, strict=True)]
    table = WeightTable(weights)
    table.set_gradients(gradients)
    update(table, *scalars)
    assert_same(weights, expected, rtol=1e-5, atol=1e-5)


def test_wrong_tensors_are_refused():
    weight = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="average must have shape that of its weight"):
        WeightTable([Weight(weight, torch.zeros(3), torch.zeros(2, 3))])
    with pytest.raises(TypeError, match=r"teacher must be torch\.float32"):
        WeightTable([Weight(weight, teacher=weight.double())])
    with pytest.raises(ValueError, match="must be contiguous"):
        WeightTable([Weight(weight, teacher=torch.zeros(3, 2).T)])
    with pytest.raises(ValueError, match="both averages"):
        WeightTable([Weight(weight, average=weight)])
    with pytest.raises(TypeError, match=r"copies must be .*, got torch\.float64"):
        WeightTable([Weight(weight, copy=weight.double())])
    table = WeightTable([Weight(weight, torch.zeros(2, 3), torch.zeros(2, 3))])
    with pytest.raises(TypeError, match=r"a gradient must be torch\.float32"):
        table.set_gradients([weight.bfloat16()])
