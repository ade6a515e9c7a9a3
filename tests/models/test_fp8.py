"""The teacher's encoder in float8: rounding, its effect on features and targets, and where it can run."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from dmtjepa.config import ConfigError, MaskSettings, parse_config
from dmtjepa.evaluation.context import load_teacher
from dmtjepa.masks import MaskSampler
from dmtjepa.models import AggregationHead, Predictor, VisionTransformer, fp8
from dmtjepa.models.layers import Linear
from dmtjepa.models.replace_method import replace_method
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.training.check import build_model_for
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.parallelize import compile_blocks, parallelize

GRID = (8, 8)


def make_model(seed: int = 0) -> DMTJEPA:
    """A small model whose weights are spread as those of a trained one: some channels are much larger than others."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(32, 4, embed_dim=128, depth=4, num_heads=4, init_std=0.06)
    predictor = Predictor(GRID, 128, predictor_dim=32, depth=1, num_heads=2)
    with torch.no_grad():
        for block in encoder.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.mul_(torch.randn(128).mul(0.5).exp())
                norm.bias.normal_(std=0.1)
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.weight.mul_(torch.randn(linear.out_features, 1).mul(0.5).exp())
                linear.bias.normal_(std=0.05)
    return DMTJEPA(encoder, predictor, AggregationHead(128, 4, init_std=0.06))


def make_inputs():
    torch.manual_seed(1)
    coarse = F.interpolate(torch.rand(4, 3, 9, 9), size=(32, 32), mode="bilinear")
    images = (255 * (0.8 * coarse + 0.2 * torch.rand(4, 3, 32, 32))).to(torch.uint8)
    return images, MaskSampler(MaskSettings(patch_size=4, min_keep=2), GRID, 4).sample(step=0)


def with_fp8_teacher(model: DMTJEPA) -> DMTJEPA:
    model = copy.deepcopy(model)
    fp8.compute_in_fp8(model.teacher_encoder.blocks, "cpu")
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_rows_are_rounded_to_four_bits_of_their_own_scale():
    torch.manual_seed(0)
    x = torch.randn(64, 80) * torch.logspace(-6, 6, 64)[:, None]
    quantized, scale = fp8.quantize_rows(x)
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (64, 1))
    assert torch.equal(quantized.float().abs().amax(1), torch.full((64,), 448.0))
    # Half a unit in the last of four bits, or of the smallest numbers' spacing 2^-9.
    error = (quantized.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001).all()
    assert (error > x.abs() / 100).any()


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.ones(4, 16)
    x[0], x[1, 3], x[2, 5] = 0, float("inf"), float("nan")
    quantized, scale = fp8.quantize_rows(x)
    out = fp8.emulated_product(quantized, scale, *fp8.quantize_rows(torch.ones(32, 16)), torch.zeros(32))
    torch.testing.assert_close(out[[0, 3]], torch.tensor([[0.0], [16.0]]).expand(2, 32))
    assert out[1:3].isnan().all()


def test_the_emulated_product_is_pytorchs():
    """PyTorch multiplies in float8 on a CPU too, but with one scale per matrix: here 1, others applied after it."""
    torch.manual_seed(0)
    (x, x_scale), (weight, weight_scale) = (
        fp8.quantize_rows(torch.randn(50, 96)),
        fp8.quantize_rows(torch.randn(32, 96)),
    )
    bias = torch.randn(32)
    one = torch.ones(())
    expected = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    expected = expected * x_scale * weight_scale.t() + bias
    torch.testing.assert_close(fp8.emulated_product(x, x_scale, weight, weight_scale, bias), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_effect_on_features_and_targets(seed):
    model = make_model(seed)
    rounded = with_fp8_teacher(model)
    images, masks = make_inputs()
    with torch.no_grad():
        h, h8 = (F.layer_norm(m.teacher_encoder(images), (128,)) for m in (model, rounded))
    assert 0.01 < relative_error(h8, h) < 0.12
    select = functools.partial(
        model.teacher_head._select_neighbors, patches=masks.target_unique, grid_size=GRID, num_neighbors=4
    )
    chosen, chosen8 = select(h), select(h8)
    kept = (chosen[:, :, None] == chosen8[:, None]).any(dim=2)
    assert kept.float().mean() > 0.9
    assert kept.all(dim=1).float().mean() > 0.7  # share of patches with the same neighbours
    targets, targets8 = (m.compute_targets(images, masks) for m in (model, rounded))
    assert 0.01 < relative_error(targets8, targets) < 0.12


def test_parameters_and_their_names_stay():
    model = make_model()
    rounded = with_fp8_teacher(model)
    before, after = model.state_dict(), rounded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The teacher's average reaches the parameters that are multiplied.
    images, masks = make_inputs()
    targets = rounded.compute_targets(images, masks)
    with torch.no_grad():
        rounded.encoder.blocks[0].mlp.fc1.weight.mul_(2)
    rounded.update_teacher(0.0)
    assert not torch.allclose(rounded.compute_targets(images, masks), targets)


def test_every_linear_layer_of_the_teachers_blocks_and_no_other():
    model = with_fp8_teacher(make_model())
    found = {name for name, module in model.named_modules() if fp8.computes_in_fp8(module)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert found == {f"teacher_encoder.blocks.{i}.{layer}" for i in range(4) for layer in layers}
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return fp8.emulated_product(*arguments)

    for module in model.modules():
        if fp8.computes_in_fp8(module):
            replace_method(module, "multiply", functools.partial(fp8.fp8_linear, product=counting))
    model.compute_targets(*make_inputs())
    assert len(calls) == len(found)  # the blocks call their layers; they do not reach for the weights


@pytest.mark.slow
def test_compiled_and_sharded():
    model = make_model()
    images, masks = make_inputs()
    expected = with_fp8_teacher(model).compute_targets(images, masks)
    rounded = with_fp8_teacher(model)
    torch._dynamo.reset()
    compile_blocks(rounded, functools.partial(torch.compile, backend="aot_eager"))
    torch.testing.assert_close(rounded.compute_targets(images, masks), expected)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallelize(rounded, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), ComputePlan())
        assert set(rounded.state_dict()) == set(model.state_dict())
        torch.testing.assert_close(rounded.compute_targets(images, masks), expected)
        rounded.loss(rounded.predict_targets(images, masks), expected, masks).backward()
    finally:
        dist.destroy_process_group()


def test_setting():
    values = {
        "data": {"crop_size": 32},
        "mask": {"patch_size": 8, "min_keep": 0},
        "meta": {"model_name": "vit_tiny", "pred_emb_dim": 48, "pred_depth": 1},
    }
    plain = build_model(parse_config(values))
    rounded = build_model(parse_config(values | {"runtime": {"teacher_precision": "fp8"}}))
    assert not fp8.computes_in_fp8(plain.teacher_encoder.blocks[0].mlp.fc1)
    assert fp8.computes_in_fp8(rounded.teacher_encoder.blocks[0].mlp.fc1)
    assert not fp8.computes_in_fp8(rounded.encoder.blocks[0].mlp.fc1)


@pytest.mark.slow
def test_a_report_measures_the_weights_without_rounding(tmp_path):
    values = {
        "data": {"crop_size": 32},
        "mask": {"patch_size": 8, "min_keep": 0},
        "meta": {"model_name": "vit_tiny", "pred_emb_dim": 48, "pred_depth": 1},
        "runtime": {"teacher_precision": "fp8"},
    }
    config = parse_config(values)
    torch.save({"target_encoder": build_model(config).teacher_encoder.state_dict()}, tmp_path / "jepa.pth.tar")
    for encoder in load_teacher(config, tmp_path / "jepa.pth.tar", "cpu"):
        assert not any(fp8.computes_in_fp8(module) for module in encoder.modules())


@pytest.mark.slow
def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    message = r"runtime.teacher_precision fp8 .*8\.9 or 9\.0 and later.* A100-SXM4-80GB has 8\.0\. Choose same"
    with pytest.raises(ValueError, match=message):
        fp8.compute_in_fp8(make_model().teacher_encoder.blocks, "cuda")
    config = parse_config({"meta": {"model_name": "vit_tiny"}, "runtime": {"teacher_precision": "fp8"}})
    with pytest.raises(ConfigError, match=message), torch.device("meta"):  # which main.py prints without a traceback
        build_model_for(config, "cuda")


def test_other_widths_are_refused():
    encoder = VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"24 to 72 channels .* multiples of 16; choose runtime\.teacher_precision"):
        fp8.compute_in_fp8(encoder.blocks, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(256, 1280, 3840), (300, 384, 1536), (33, 5120, 1280), (1, 192, 192)]
)
def test_the_gpus_product_is_the_emulated_one(rows, width, out):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    fp8.choose_product("cuda")
    x = torch.randn(rows, width, device="cuda") * torch.logspace(-3, 3, rows, device="cuda")[:, None]
    weight, bias = torch.randn(out, width, device="cuda"), torch.randn(out, device="cuda")
    arguments = (*fp8.quantize_rows(x), *fp8.quantize_rows(weight), bias)
    expected = fp8.emulated_product(*arguments)
    # The GPU rounds its results to bfloat16 (2e-3) and, on Hopper, its partial sums of 5120 terms to 14 bits (4e-3).
    assert relative_error(fp8.scaled_product(*arguments).float(), expected) < 2e-2
    layer = Linear(width, out, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    replace_method(layer, "multiply", functools.partial(fp8.fp8_linear, product=fp8.scaled_product))
    x = x.bfloat16()
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(compiled.float(), layer(x).float()) < 1e-2
