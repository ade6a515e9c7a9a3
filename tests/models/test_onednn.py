"""Linear layers by oneDNN."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa.config import parse_config
from dmtjepa.masks import MaskSampler
from dmtjepa.models import onednn
from dmtjepa.models.layers import Linear
from dmtjepa.models.onednn import compute_by_onednn, onednn_linear, pad_rows
from dmtjepa.objective import build_model

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (3, 5, 40), (2, 3, 5, 40), (3, 43, 40), (0, 40)])
def test_outputs_and_gradients_equal_the_definition(shape, dtype, compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, weight, bias, grad = torch.randn(shape), torch.randn(24, 40), torch.randn(24), torch.randn(*shape[:-1], 24)

    def definition(x, weight, bias):
        return torch.einsum("...k,nk->...n", x, weight) + bias

    results = []
    for multiply, wide in ((onednn_linear, dtype), (definition, torch.float64)):
        if multiply is onednn_linear and compiled:
            multiply = torch.compile(multiply, fullgraph=True, backend="aot_eager")
        leaves = [t.to(dtype).to(wide).detach().requires_grad_() for t in (x, weight, bias)]
        out = multiply(*leaves)
        out.backward(grad.to(dtype).to(wide))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_rows_of_a_weight_and_strided_gradients():
    """A block computes the queries of some tokens only; attention returns strided gradients."""
    torch.manual_seed(0)
    weight, x = torch.randn(30, 16, requires_grad=True), torch.randn(2, 9, 16, requires_grad=True)
    grad = torch.randn(9, 2, 10).transpose(0, 1)
    for multiply in (onednn_linear, torch.nn.functional.linear):
        out = multiply(x[:, 4:], weight[10:20], None)
        gradients = torch.autograd.grad(out, (x, weight), grad[:, 4:])
        if multiply is onednn_linear:
            actual = (out, *gradients)
    for ours, expected in zip(actual, (out, *gradients), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_gradient_that_is_not_needed_is_not_computed():
    layer = Linear(16, 8)
    compute_by_onednn(layer)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, 16)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 16 * 8)  # outputs and the gradient of the weight


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_rows_come_again_and_rows_do_not_change(monkeypatch, dtype):
    """oneDNN generates code for each new shape."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a CPU without bfloat16")
    multiply, seen = torch.ops.mkldnn._linear_pointwise, set()

    def watch(x, *others):
        seen.add(len(x))
        return multiply(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watch)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1100, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(8).to(dtype)
    whole = onednn_linear(x, weight, bias)
    for num_rows in range(1024, 1100):
        assert torch.equal(onednn_linear(x[:num_rows], weight, bias), whole[:num_rows])
    assert len(seen) <= 4  # of the 32 from 1024 to 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_pads_what_onednn_computes(monkeypatch, dtype):
    """The gradient of the inputs, and in bfloat16 that of the weight: MKL computes float32 and needs no padding."""
    seen = []

    def watch(x):
        seen.append(tuple(x.shape))
        return pad_rows(x)

    x, weight = torch.randn(129, 16).to(dtype).requires_grad_(), torch.randn(8, 16).to(dtype).requires_grad_()
    out = onednn_linear(x, weight, None)
    monkeypatch.setattr(onednn, "pad_rows", watch)
    out.sum().backward()
    supported = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = [(129, 8)] * supported + [(129, 8), (129, 16)] * (dtype == torch.bfloat16)
    assert sorted(seen) == sorted(expected)


def test_rows_are_padded_by_less_than_a_32nd():
    for num_rows in [*range(200), 1000, 1025, 2047, 2049, 10_000, 12_345]:
        padded = pad_rows(torch.ones(num_rows, 1))
        assert num_rows <= len(padded) <= num_rows * 33 / 32
        assert padded.sum() == num_rows


SMALL = {
    "data": {"crop_size": 32, "batch_size": 2},
    "mask": {"patch_size": 8, "min_keep": 0},
    "meta": {"model_name": "vit_tiny", "pred_emb_dim": 48, "pred_depth": 1},
    "patch": {"local_agg_head": True},
    "runtime": {"attention": "sdpa"},
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_models_on_a_cpu_take_it_and_others_do_not():
    def products(device_type):
        model = copy.deepcopy(build_model(parse_config(SMALL), device_type))
        return {module.multiply for module in model.modules() if isinstance(module, Linear)}

    assert products("cpu") == {onednn_linear}
    assert products("cuda") == {torch.nn.functional.linear}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_for_a_cpu_trains_under_autocast(dtype):
    config = parse_config(SMALL)
    torch.manual_seed(0)
    model, masks = build_model(config, "cpu"), MaskSampler.from_config(config).sample(step=0)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(images, masks)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    exact, rounded = gradients
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert rounded.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    for name in ("encoder.blocks.0.attn.qkv.weight", "predictor.predictor_proj.weight"):
        assert (rounded[name] - exact[name]).norm() < 0.1 * exact[name].norm()


@pytest.mark.slow
def test_a_compiled_layer_computes_under_autocast():
    torch._dynamo.reset()
    layer = Linear(16, 8)
    compute_by_onednn(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
        torch.testing.assert_close(compiled(x), layer(x))


def test_different_dtypes_are_refused_as_pytorch_does():
    with pytest.raises(RuntimeError, match="dtype"):
        onednn_linear(torch.randn(2, 16), torch.randn(8, 16, dtype=torch.float64), None)
