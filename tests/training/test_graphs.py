"""CUDA graphs of steps: what needs no GPU. tests/fake_cuda/test_graphs.py captures and replays them."""

import pytest
import torch

from dmtjepa.config import ConfigError, MaskSettings
from dmtjepa.masks import MaskSampler
from dmtjepa.training.graphs import GraphedStep, check_graphs, pad_masks, uses_graphs
from tests.helpers.models import Case, make_images, make_masks, make_model


@pytest.mark.parametrize("context_loss", [0.0, 0.5])
@pytest.mark.parametrize("query", ["image", "targets", "patch"])
def test_padded_masks_give_the_same_loss_and_gradients(query, context_loss):
    case = Case(3, (6, 6), 4, 3, "wrap", query=query, context_loss=context_loss)
    model, images = make_model(case, torch.float64), make_images(case, torch.float64)
    found = []
    for pad in (False, True):
        masks = make_masks(case)
        if pad:
            num_covered = len(masks.target_unique)
            masks = pad_masks(masks, 36)
            assert len(masks.target_unique) == 3 * min(36, 4 * masks.target_index.shape[2]) > num_covered
            assert len(masks.neighborhood) == 3 * 36
        model.zero_grad()
        loss = model(images, masks)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-12)


def test_blocks_cover_no_more_than_all_patches():
    settings = MaskSettings(patch_size=4, min_keep=0, num_pred_masks=12)
    masks = MaskSampler(settings, (6, 6), 2, 1, 3, "wrap").sample(0)
    assert 12 * masks.target_index.shape[2] > 36
    padded = pad_masks(masks, 36)
    assert len(padded.target_unique) == 2 * 36
    assert torch.equal(padded.target_unique[: len(masks.target_unique)], masks.target_unique)


def test_graphs_on_the_gpus_whose_float8_products_ignore_their_stream(settings, monkeypatch):
    config = settings(**{"runtime.cuda_graphs": "on", "runtime.fused_update": True, "runtime.teacher_precision": "fp8"})
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_graphs(config, 1, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ConfigError, match=r"needs runtime\.teacher_precision: same on this GPU"):
        check_graphs(config, 1, "cuda")


@pytest.mark.parametrize(
    ("changes", "world_size", "device", "needed"),
    [
        ({}, 1, "cpu", "needs a GPU"),
        ({}, 2, "cuda", "needs one process, and there are 2"),
        ({"runtime.fused_update": False}, 1, "cuda", r"needs runtime\.fused_update: true"),
        ({"runtime.accumulation": 2}, 1, "cuda", r"needs runtime\.accumulation: 1"),
        ({"mask.pack": True}, 1, "cuda", r"needs mask\.pack: false"),
    ],
    ids=str,
)
def test_what_graphs_need_is_named(settings, changes, world_size, device, needed):
    values = {"runtime.cuda_graphs": "on", "runtime.fused_update": True} | changes
    with pytest.raises(ConfigError, match=rf"runtime\.cuda_graphs: on {needed}, or set it to off"):
        check_graphs(settings(**values), world_size, device)
    config = settings(**values | {"runtime.cuda_graphs": "auto"})
    check_graphs(config, world_size, device)
    assert not uses_graphs(config, world_size, device)


def test_auto_chooses_them_for_small_models(settings, monkeypatch):
    config = settings(**{"runtime.cuda_graphs": "auto", "runtime.fused_update": True})
    assert uses_graphs(config, 1, "cuda")
    monkeypatch.setattr("dmtjepa.training.graphs.DEVICE_RATE", 1e9)
    assert not uses_graphs(config, 1, "cuda")
    assert uses_graphs(settings(**{"runtime.cuda_graphs": True, "runtime.fused_update": True}), 1, "cuda")


def test_a_step_that_is_not_fused_is_refused():
    class Step:
        fused_update = None

    with pytest.raises(ValueError, match="the step must be fused"):
        GraphedStep(Step())
