"""Linear layers by oneDNN."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa.config import parse_config
from dmtjepa.models.layers import Linear
from dmtjepa.models.onednn import compute_by_onednn, onednn_linear
from dmtjepa.objective import build_model

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (3, 5, 40), (2, 3, 5, 40), (0, 40)])
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
    """As a block computes the queries of some rows alone, and as attention hands its gradients back."""
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
def test_models_on_a_cpu_take_it_and_others_do_not():
    config = parse_config(
        {
            "data": {"crop_size": 32},
            "mask": {"patch_size": 8, "min_keep": 0},
            "meta": {"model_name": "vit_tiny", "pred_emb_dim": 48, "pred_depth": 1},
            "runtime": {"attention": "sdpa"},
        }
    )

    def products(device_type):
        model = copy.deepcopy(build_model(config, device_type))
        return {module.multiply for module in model.modules() if isinstance(module, Linear)}

    assert products("cpu") == {onednn_linear}
    assert products("cuda") == {torch.nn.functional.linear}
