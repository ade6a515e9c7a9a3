"""Packed contexts: every image keeps its whole context, and each computes as if it were alone."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa.config import MaskSettings, parse_config
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.models.attention import choose_attention, cpu_attention, flash_attention, sdpa_attention
from dmtjepa.packing import Packing, pack, pack_predictions
from dmtjepa.reference import step as reference
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.estimate import measure_masks
from dmtjepa.training.parallelize import compile_blocks, parallelize
from tests.helpers.models import PATCH, Case, make_images, make_model, packed_masks, relative_error, student_gradients

CASE = Case(3, (6, 6), 4, 3, "clip")


def contexts_of(masks: MaskBatch, num_patches: int) -> list[torch.Tensor]:
    """The context patches of each image."""
    image, patch = masks.context_index[0] // num_patches, masks.context_index[0] % num_patches
    return [patch[image == b] for b in range(len(masks.target_index))]


def as_packed(masks: MaskBatch, num_patches: int) -> MaskBatch:
    """Masks whose contexts all have one length, in the packed form."""
    batch, length = masks.context_index.shape
    lengths = torch.full((batch,), length).numpy()
    return dataclasses.replace(
        masks,
        context_index=(masks.context_index + num_patches * torch.arange(batch)[:, None]).view(1, -1),
        context_packing=pack(lengths),
        prediction_packing=pack_predictions(lengths, *masks.target_index.shape[1:]),
    )


def assert_equal_gradients(model, expected: dict[str, torch.Tensor]) -> None:
    gradients = student_gradients(model)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if not name.endswith("attn.k.bias"):  # of the heads: both are rounding errors around zero
            assert relative_error(gradient, expected[name]) < 1e-9, name


def test_packing():
    packing = pack(torch.tensor([2, 1, 3]).numpy())
    assert packing.start.tolist() == [0, 2, 3, 6]
    assert packing.start.dtype == torch.int32
    assert packing.sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert packing.padded.tolist() == [[0, 1, 0], [2, 2, 2], [3, 4, 5]]
    assert packing.lengths().tolist() == [2, 1, 3]
    assert packing.present().tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    x = torch.randn(1, 6, 4)
    assert torch.equal(packing.unpad(packing.pad(x)), x)


def test_sequences_of_the_predictor():
    packed = pack_predictions(torch.tensor([2, 1]).numpy(), 2, 3)
    # Tokens 0 and 1 are the context of image 0, token 2 that of image 1. Then 3 tokens follow for each block.
    assert packed.token_index.tolist() == [[0, 1, 3, 4, 5, 0, 1, 6, 7, 8, 2, 9, 10, 11, 2, 12, 13, 14]]
    assert packed.packing.start.tolist() == [0, 5, 10, 14, 18]
    assert packed.token_index[0, packed.target].tolist() == list(range(3, 15))
    assert packed.token_index[0, packed.context].tolist() == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("sampler", ["released", "corrected"])
def test_every_context_is_whole(sampler):
    settings = MaskSettings(patch_size=PATCH, min_keep=2, sampler=sampler)
    packed = MaskSampler(settings.model_copy(update={"pack": True}), (9, 9), batch_size=8).sample(3, 1, 2)
    cut = MaskSampler(settings, (9, 9), batch_size=8).sample(3, 1, 2)
    for name in ("target_index", "target_unique", "target_slot", "neighborhood"):
        assert torch.equal(getattr(packed, name), getattr(cut, name))
    contexts = contexts_of(packed, 81)
    assert all(map(torch.equal, packed.contexts(81), contexts))
    assert all(map(torch.equal, cut.contexts(81), cut.context_index))
    assert [len(context) for context in contexts] == packed.context_packing.lengths().tolist()
    assert min(map(len, contexts)) == cut.context_index.shape[1]
    assert packed.context_size == sum(map(len, contexts)) / 8 > cut.context_size
    for b, context in enumerate(contexts):
        assert set(cut.context_index[b].tolist()) <= set(context.tolist())
        # The context of an image alone is cut to its own length: not at all.
        alone = MaskSampler(settings, (9, 9), batch_size=1).sample(3, 8 + b, 16)
        assert torch.equal(context, alone.context_index[0])
        assert not set(context.tolist()) & set(packed.target_index[b].flatten().tolist())


def test_estimate_counts_the_longer_contexts():
    values = {"data": {"crop_size": 72, "batch_size": 8}, "mask": {"patch_size": 8, "min_keep": 2}}
    cut, packed = (parse_config(values | {"mask": values["mask"] | {"pack": pack}}) for pack in (False, True))
    means = [measure_masks(config, num_steps=4)[0] for config in (cut, packed)]
    sizes = [MaskSampler(packed.mask, (9, 9), 8).sample(step).context_packing.lengths() for step in range(4)]
    assert means[1].context == torch.cat(sizes).double().mean() > means[0].context
    assert means[1].target == means[0].target


@pytest.mark.parametrize("case", [CASE, CASE._replace(head=False)], ids=str)
def test_equal_lengths_compute_as_unpacked(case):
    model, images = make_model(case, torch.float64), make_images(case, torch.float64)
    settings = MaskSettings(patch_size=PATCH, min_keep=case.min_keep)
    masks = MaskSampler(settings, case.grid, case.batch, seed=1, border=case.border).sample(step=0)
    loss = model(images, masks)
    loss.backward()
    expected = student_gradients(model)
    model.zero_grad()
    packed = model(images, as_packed(masks, 36))
    packed.backward()
    torch.testing.assert_close(packed, loss, rtol=1e-9, atol=0)
    assert_equal_gradients(model, expected)


@pytest.mark.parametrize(
    "case",
    [
        CASE, CASE._replace(grid=(6, 9)), CASE._replace(head=False), CASE._replace(context_loss=0.5),
        CASE._replace(head=False, context_loss=0.5), CASE._replace(query="targets", context_loss=0.5),
        CASE._replace(query="patch", context_loss=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_each_image_computes_as_if_alone(case):
    """Against the reference, one image at a time; the loss is the mean over all predictions."""
    model, images, masks = make_model(case, torch.float64), make_images(case, torch.float64), packed_masks(case)
    contexts = contexts_of(masks, case.grid[0] * case.grid[1])
    assert len(set(map(len, contexts))) > 1
    predictions = reference.predict_targets(model, images, contexts, masks.target_index)
    losses = [
        reference.compute_loss(model, images[b : b + 1], context[None], masks.target_index[b : b + 1])
        for b, context in enumerate(contexts)
    ]
    expected_loss = torch.stack(losses).mean()
    if case.context_loss:  # long contexts count more
        expected_loss = reference.compute_loss(
            model, images, contexts, masks.target_index, context_loss=case.context_loss
        )
    expected_loss.backward()
    expected = student_gradients(model)
    model.zero_grad()

    actual = model.predict_targets(images, masks)
    loss = model.loss(actual, model.compute_targets(images, masks), masks)
    loss.backward()
    assert relative_error(actual.targets, predictions) < 1e-9
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    assert_equal_gradients(model, expected)


def test_uint8_images():
    model, masks = make_model(CASE, torch.float64), packed_masks(CASE)
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    normalised = reference.normalize_pixels(images, torch.float64)
    expected = model.predict_targets(normalised, masks).targets
    for layout in (torch.contiguous_format, torch.channels_last):
        actual = model.predict_targets(images.contiguous(memory_format=layout), masks).targets
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_cpu(dtype):
    torch.manual_seed(0)
    packing = pack(torch.tensor([3, 7, 1]).numpy())
    query, key, value = torch.randn(3, 1, 11, 2, 8, dtype=dtype)
    actual = cpu_attention(query, key, value, packing)
    for first, end in ((0, 3), (3, 10), (10, 11)):
        one = (x[:, first:end].float() for x in (query, key, value))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual[:, first:end].float(), sdpa_attention(*one), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("context_loss", [0.0, 0.5])
def test_compiled_once_for_many_shapes_and_sharded(context_loss):
    case = CASE._replace(context_loss=context_loss)
    model, images = make_model(case, torch.float32), make_images(case, torch.float32)
    masks = [packed_masks(CASE, step) for step in range(4)]
    assert len({len(m.context_packing.sequence) for m in masks}) == 4
    expected = [model(images, m) for m in masks]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_blocks(model, functools.partial(torch.compile, backend=backend))
    for m, loss in zip(masks, expected, strict=True):
        torch.testing.assert_close(model(images, m), loss)
    assert len(graphs) == 5  # blocks of encoder, predictor and teacher, which share theirs; and two heads

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        parallelize(model, mesh, ComputePlan(recompute="blocks"))
        for m, loss in zip(masks[:2], expected, strict=False):
            actual = model.loss(model.predict_targets(images, m), model.compute_targets(images, m), m)
            torch.testing.assert_close(actual, loss)
            actual.backward()
    finally:
        dist.destroy_process_group()


def test_masks_move_with_their_packing():
    masks = packed_masks(CASE)
    moved = masks.to("meta")
    assert moved.context_packing.start.device.type == "meta"
    assert moved.prediction_packing.packing.padded.shape == masks.prediction_packing.packing.padded.shape
    assert moved.prediction_packing.token_index.device.type == "meta"


@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
def test_flops_of_packed_attention(backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    packing = Packing(*(x.to("meta") for x in pack(torch.tensor([3, 7, 1]).numpy())))
    inputs = [torch.empty(1, 11, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]
    attention = choose_attention(backend, "cuda", 8)  # registers the formulas, which a counter reads when it is made
    with FlopCounterMode(display=False) as counter:
        attention(*inputs, packing).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 8 * 11 * 7


def test_packed_attention_never_runs_on_cudnn(monkeypatch):
    """Newer versions of `varlen_attn` choose cuDNN unless it is switched off."""
    enabled = []

    def attend(query, *_arguments):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return query

    monkeypatch.setattr("dmtjepa.models.attention.varlen_attn", attend)
    inputs = torch.zeros(3, 1, 11, 2, 8, dtype=torch.bfloat16)
    packing = Packing(*pack(torch.tensor([3, 7, 1]).numpy()))
    assert torch.equal(flash_attention(*inputs, packing), inputs[0])
    assert enabled == [False]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88])
def test_xformers_equals_sdpa(head_dim):
    pytest.importorskip("xformers")
    xformers = choose_attention("xformers", "cuda", head_dim)
    packing = Packing(*(x.cuda() for x in pack(torch.tensor([68, 1, 140, 97]).numpy())))
    inputs = [torch.randn(1, 306, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for attend in (xformers, sdpa_attention, flash_attention, torch.compile(xformers, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, packing)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for result in results[1:]:
        for actual, expected in zip(results[0], result, strict=True):
            torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-2, atol=2e-2)
