"""Encoder, predictor and head: shapes, parameter names, position embeddings, errors."""

import math

import numpy as np
import pytest
import torch

from dmtjepa.models import ARCHITECTURES, AggregationHead, Predictor, VisionTransformer
from dmtjepa.models.attention import (
    choose_attention,
    cpu_attention,
    flash_attention,
    load_xformers,
    sdpa_attention,
    xformers_attention,
)
from dmtjepa.models.layers import resample_position_embedding, sincos_position_embedding
from dmtjepa.packing import pack


def test_encoder_shapes_and_index():
    encoder = VisionTransformer(image_size=(24, 40), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    images = torch.randn(3, 3, 24, 40)
    assert encoder(images).shape == (3, 15, 32)
    index = torch.stack([torch.randperm(15)[:6].sort().values for _ in range(3)])
    assert encoder(images, index).shape == (3, 6, 32)
    # With all patches asked for by index the encoder is the whole one; with some, it is another function of fewer.
    everything = torch.arange(15).expand(3, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_uint8_batches_in_both_memory_layouts():
    encoder = VisionTransformer(image_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(encoder(images.contiguous(memory_format=torch.channels_last)), encoder(images))


def test_official_parameter_names():
    encoder = VisionTransformer(image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    assert set(encoder.state_dict()) == {
        "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.weight", "norm.bias",
        *(f"blocks.0.{name}" for name in block),
    }  # fmt: skip
    assert encoder.state_dict()["pos_embed"].shape == (1, 16, 32)
    assert encoder.state_dict()["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    predictor = Predictor((4, 4), embed_dim=32, predictor_dim=16, depth=1, num_heads=2)
    assert set(predictor.state_dict()) == {
        "predictor_embed.weight", "predictor_embed.bias", "mask_token", "predictor_pos_embed",
        "predictor_norm.weight", "predictor_norm.bias", "predictor_proj.weight", "predictor_proj.bias",
        *(f"predictor_blocks.0.{name}" for name in block),
    }  # fmt: skip
    head = AggregationHead(32, 2)
    single = [name for name in block if "qkv" not in name]
    single += [f"attn.{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")]
    assert set(head.state_dict()) == {
        "norm.weight", "norm.bias", *(f"cls_blocks.{i}.{name}" for i in range(2) for name in single),
    }  # fmt: skip


@pytest.mark.slow
# Parameters of the official encoders: ViT-B/16 and H/14 as in I-JEPA, without class token and with 3 image channels.
@pytest.mark.parametrize(
    ("name", "patch", "millions"),
    [("vit_nano", 16, 0.9), ("vit_tiny", 16, 5.4), ("vit_small", 16, 21.5), ("vit_base", 16, 85.6),
     ("vit_large", 16, 303.1), ("vit_huge", 14, 630.4), ("vit_giant", 16, 1011.4)],
)  # fmt: skip
def test_sizes(name, patch, millions):
    with torch.device("meta"):
        encoder = VisionTransformer(224, patch, **ARCHITECTURES[name])
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_position_embedding_formula():
    table = sincos_position_embedding((3, 5), 16)
    assert table.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            for i in range(4):
                frequency = 10000 ** (-i / 4)
                expected = [math.sin(column * frequency), math.cos(column * frequency),
                            math.sin(row * frequency), math.cos(row * frequency)]  # fmt: skip
                actual = table[row * 5 + column, [i, 4 + i, 8 + i, 12 + i]]
                torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position_embedding((3, 5), 18)


def test_other_image_sizes_resample_the_position_embedding():
    encoder = VisionTransformer(image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert encoder(torch.randn(2, 3, 56, 24)).shape == (2, 21, 32)
    smooth = sincos_position_embedding((8, 8), 32)
    doubled = resample_position_embedding(smooth, (8, 8), (16, 16)).view(16, 16, 32)
    # A resampled table is the same image: its 2x2 means are close to the original.
    means = doubled.view(8, 2, 8, 2, 32).mean((1, 3))
    assert (means - smooth.view(8, 8, 32))[1:-1, 1:-1].abs().max() < 0.1
    assert resample_position_embedding(smooth, (8, 8), (8, 8)) is smooth


def test_predictor_treats_each_block_separately():
    predictor = Predictor((4, 4), embed_dim=32, predictor_dim=16, depth=2, num_heads=2)
    context, context_index = torch.randn(2, 5, 32), torch.arange(5).expand(2, -1)
    blocks = torch.tensor([[6, 7], [10, 11], [14, 15]]).expand(2, -1, -1)
    together = predictor(context, context_index, blocks).targets
    assert together.shape == (2, 3, 2, 32)
    for m in range(3):
        alone = predictor(context, context_index, blocks[:, m : m + 1]).targets
        torch.testing.assert_close(together[:, m : m + 1], alone)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VisionTransformer(image_size=10, patch_size=16), "smaller than a patch"),
        (lambda: VisionTransformer(image_size=40, patch_size=16), "not a multiple of the patch size"),
        (lambda: VisionTransformer(embed_dim=100, num_heads=3, depth=1), "not a multiple of the number of heads"),
        (lambda: AggregationHead(100, 3), "not a multiple of the number of heads"),
        (lambda: AggregationHead(96, 3, border="mirror"), "wrap or clip"),
        (lambda: AggregationHead(96, 3, query="mean"), "image, targets or patch"),
        (lambda: VisionTransformer(image_size=32, depth=1)(torch.zeros(1, 3, 40, 32)), "no multiple of the patch size"),
        (lambda: choose_attention("flash", "cuda", 64), "auto, xformers or sdpa"),
        (lambda: choose_attention("xformers", "cuda", 12), r"heads of 12 channels.*sdpa or auto"),
    ],
)
def test_impossible_models_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_cpu_has_one_attention():
    for backend in ("auto", "xformers", "sdpa"):
        assert choose_attention(backend, "cpu", 64) is cpu_attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_of_a_cpu_equals_the_definition(dtype, tolerance):
    inputs = [torch.randn(2, 13, 3, 24).to(dtype) for _ in range(3)]

    def definition(query, key, value):
        score = torch.einsum("blhe,bmhe->bhlm", query, key) / 24**0.5
        return torch.einsum("bhlm,bmhe->blhe", score.softmax(-1), value)

    results = []
    for attend, wide in ((cpu_attention, dtype), (definition, torch.float64)):
        leaves = [x.to(wide, copy=True).requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.double().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_heads_that_xformers_does_not_take_go_to_sdpa():
    assert choose_attention("auto", "cuda", 12) is flash_attention


def test_without_xformers_attention_runs_on_the_flash_kernels_of_pytorch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"xFormers is not installed.*PyTorch's own flash kernels"):
        assert choose_attention("auto", "cuda", 64) is flash_attention
    with pytest.raises(ModuleNotFoundError, match="pip install xformers"):
        choose_attention("xformers", "cuda", 64)


@pytest.fixture(scope="module")
def flash_on_a_cpu():
    """xFormers' operators computed by definition on a CPU: what is left to test is how they are called."""
    pytest.importorskip("xformers")
    load_xformers()

    def each_sequence(function, start, *tensors):
        """`function` of [B, L, H, E], or of the sequences that begin at `start`, one by one and joined again."""
        if start is None:
            return function(*tensors)
        parts = zip(*(x.tensor_split(start[1:-1].long()) for x in tensors), strict=True)
        results = [function(*(x[None] for x in each)) for each in parts]
        return [torch.cat([x[0] for x in each]) for each in zip(*results, strict=True)]

    def attend(query, key, value):
        query, key, value = (x.float() for x in (query, key, value))
        weight = (torch.einsum("blhe,bmhe->bhlm", query, key) / query.shape[-1] ** 0.5).softmax(3)
        return [torch.einsum("bhlm,bmhe->blhe", weight, value).bfloat16()]

    def differentiate(grad, query, key, value):
        grad, query, key, value = (x.float() for x in (grad, query, key, value))
        scale = query.shape[-1] ** -0.5
        weight = (torch.einsum("blhe,bmhe->bhlm", query, key) * scale).softmax(3)
        for_weight = torch.einsum("blhe,bmhe->bhlm", grad, value)
        for_score = scale * weight * (for_weight - (for_weight * weight).sum(3, keepdim=True))
        gradients = torch.einsum("bhlm,bmhe->blhe", for_score, key), torch.einsum("bhlm,blhe->bmhe", for_score, query)
        return [x.bfloat16() for x in (*gradients, torch.einsum("bhlm,blhe->bmhe", weight, grad))]

    def forward(query, key, value, start, key_start, used, most, most_keys, p, scale, *_):
        assert (start is None) == (query.ndim == 4)
        assert most == (query.shape[1] if start is None else start.diff().max())
        assert most_keys == (key.shape[1] if start is None else key_start.diff().max())
        assert (used, p, scale) == (None, 0.0, query.shape[-1] ** -0.5)
        lse = query.new_zeros(query.shape[:-1], dtype=torch.float32).movedim(-1, -2)
        return each_sequence(attend, start, query, key, value)[0], lse, torch.zeros(2, dtype=torch.int64)

    def backward(share, grad, query, key, value, out, lse, start, *_):
        return tuple(each_sequence(differentiate, start, grad, query, key, value))

    library = torch.library.Library("xformers_flash", "IMPL", "CPU")
    library.impl("flash_fwd", forward)
    library.impl("flash_bwd", backward)
    yield
    library._destroy()


@pytest.mark.usefixtures("flash_on_a_cpu")
@pytest.mark.parametrize("case", ["joint", "fewer queries", "packed", "float32"])
def test_how_xformers_is_called(case):
    torch.manual_seed(0)
    lengths = [3, 7, 1]
    packing = pack(np.array(lengths)) if case == "packed" else None
    shape = (1, 11, 3, 2, 8) if packing else (2, 11, 3, 2, 8)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    results = []
    for attend in (xformers_attention, sdpa_attention):
        joint = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        query, key, value = joint.unbind(2)
        out = attend(query[:, :4] if case == "fewer queries" else query, key, value, packing)
        out.float().square().sum().backward()
        results.append((out, joint.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88])
@pytest.mark.parametrize("length", [68, 112, 256])
def test_xformers_equals_sdpa(head_dim, length):
    pytest.importorskip("xformers")
    xformers = choose_attention("xformers", "cuda", head_dim)
    inputs = [torch.randn(4, length, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for attend in (xformers, flash_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-2)
    compiled = torch.compile(xformers, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), xformers(*inputs))


@torch.no_grad()
def test_a_float32_residual_stream_is_closer_to_float32():
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    encoder = VisionTransformer(64, 8, embed_dim=96, depth=12, num_heads=3, init_std=0.1)
    expected = encoder(images)
    error = {}
    for dtype in (None, torch.float32):
        other = VisionTransformer(64, 8, embed_dim=96, depth=12, num_heads=3, residual_dtype=dtype).bfloat16()
        other.load_state_dict(encoder.state_dict())
        found = other(images)
        assert found.dtype == torch.bfloat16
        error[dtype] = float((found.float() - expected).norm() / expected.norm())
        assert other.double()(images).dtype == torch.float64
    assert error[torch.float32] < 0.75 * error[None]
