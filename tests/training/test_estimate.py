"""Predictions of --dry-run against official counts and PyTorch's counter of operations."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa.config import load_config
from dmtjepa.masks import MaskSampler
from dmtjepa.objective import build_model
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.estimate import (
    MaskShapes,
    count_parameters,
    describe,
    explain_oom,
    measure_masks,
    memory_bytes,
    resolve_checkpointing,
    step_flops,
)
from dmtjepa.training.optimizer import UPDATED_BYTES

CONFIGS = Path(__file__).parents[2] / "configs"
AT_14 = MaskShapes(context=48.5, target=33.2, unique=87, neighborhood=133)
AT_16 = MaskShapes(context=68.3, target=44.2, unique=115, neighborhood=168)


@pytest.mark.parametrize(
    ("name", "shapes", "gigaflops"),
    [("in1k_vitb16_ep600", AT_14, 88.1), ("in1k_vitl16_ep600", AT_14, 265.7), ("in1k_vith14_ep300", AT_16, 677)],
)
def test_flops_of_the_official_runs(name, shapes, gigaflops):
    flops = step_flops(load_config(CONFIGS / f"{name}.yaml"), shapes)
    assert sum(flops.values()) / 1e9 == pytest.approx(gigaflops, rel=0.03)


def test_mean_mask_shapes_are_those_of_the_official_sampler():
    mean, largest = measure_masks(load_config(CONFIGS / "in1k_vith14_ep300.yaml"), num_steps=100)
    assert mean.context == pytest.approx(AT_16.context, rel=0.1)
    assert mean.target == pytest.approx(AT_16.target, rel=0.05)
    assert mean.unique == pytest.approx(AT_16.unique, rel=0.05)
    assert mean.neighborhood == pytest.approx(AT_16.neighborhood, rel=0.05)
    assert largest.context > mean.context


@pytest.mark.slow
@pytest.mark.parametrize("context_loss", [0.0, 0.5])
@pytest.mark.parametrize("query", ["image", "targets", "patch"])
def test_flops_agree_with_a_counted_step(settings, query, context_loss):
    config = settings(**{"patch.query": query, "optimization.context_loss": context_loss})
    masks = MaskSampler.from_config(config, batch_size=16, seed=0).sample(step=0)
    shapes = MaskShapes(
        masks.context_index.shape[1],
        masks.target_index.shape[2],
        len(masks.target_unique) / 16,
        len(masks.neighborhood) / 16,
    )
    model = build_model(config)
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    # The counter knows matrix products alone: not the CPU's fused attention, nor this project's own operators.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, masks).backward()
    assert counter.get_total_flops() / 16 == pytest.approx(sum(step_flops(config, shapes).values()), rel=0.08)


def test_parameters_are_those_of_the_built_model(settings):
    config = settings()
    built = build_model(config)
    counted = count_parameters(config)
    assert sum(counted.values()) == sum(parameter.numel() for parameter in built.parameters())
    assert counted["teacher_encoder"] == counted["encoder"]


@pytest.mark.slow
def test_memory_falls_with_the_number_of_devices():
    config = load_config(CONFIGS / "in1k_vith14_ep300.yaml")
    _, largest = measure_masks(config)
    one, sixteen = (memory_bytes(config, largest, world_size, on_cuda=True) for world_size in (1, 16))
    assert sixteen["student, gradients, AdamW"] == one["student, gradients, AdamW"] / 16
    assert sixteen["saved activations"] == one["saved activations"]
    student = sum(n for name, n in count_parameters(config).items() if not name.startswith("teacher"))
    assert one["copies for update norms"] == UPDATED_BYTES
    assert sixteen["copies for update norms"] == min(4 * student / 16, UPDATED_BYTES) > 0


def test_a_float32_residual_stream_takes_memory():
    """Two of the numbers that a block keeps per patch and channel have 4 bytes, not 2; one if blocks are recomputed."""
    shapes = MaskShapes(context=60, target=40, unique=100, neighborhood=150)
    for recompute, kept, wide in (("none", 16, 2), ("pointwise", 10, 2), ("blocks", 1, 1)):
        saved = []
        for residual in ("bfloat16", "float32"):
            changes = [f"runtime.residual={residual}", f"runtime.activation_checkpointing={recompute}"]
            config = load_config(CONFIGS / "quickstart.yaml", [*changes, "patch.local_agg_head=false"])
            saved.append(memory_bytes(config, shapes, 1, on_cuda=True)["saved activations"])
        assert saved[1] / saved[0] == pytest.approx((kept + wide) / kept)


@pytest.mark.slow
def test_auto_keeps_all_activations_where_they_fit_by_estimate(monkeypatch):
    def resolved(gib, device="cuda", **changes):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30)
        )
        config = load_config(
            CONFIGS / "in1k_vith14_ep300.yaml", [f"runtime.{key}={value}" for key, value in changes.items()]
        )
        changed = resolve_checkpointing(config, 1, torch.device(device))
        return ComputePlan.from_config(changed, device).recompute

    assert resolved(80) == "none"  # H/14 with 128 images on an H100
    assert resolved(40) == "pointwise"
    assert resolved(80, activation_checkpointing="blocks") == "blocks"
    assert resolved(80, activation_checkpointing="pointwise") == "pointwise"
    assert resolved(80, "cpu", compile="on") == "pointwise"


@pytest.mark.slow
def test_dry_run_tells_batch_and_scaled_rate():
    config = load_config(CONFIGS / "in1k_vitb16_ep600.yaml", ["optimization.lr_batch_size=2048", "data.batch_size=128"])
    text = describe(config, 4, "cuda:0")
    assert "effective batch    512 = 128 x 4 processes x 1 accumulated" in text
    assert "0.0005 to 0.00025 to" not in text
    assert "5e-05 to 0.00025 to 2.5e-07 (scaled from a batch of 2048)" in text


@pytest.mark.slow
def test_lack_of_memory_names_what_would_fit(monkeypatch):
    config = load_config(CONFIGS / "in1k_vith14_ep300.yaml", ["data.batch_size=512"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.25 GiB.\nmore")
    text = explain_oom(config, 1, torch.device("cuda:0"), error)
    assert "cuda:0 with 80.0 GiB has no memory for data.batch_size 512" in text
    assert "Tried to allocate 1.25 GiB)" in text
    assert "should fit" not in text
    offers = re.findall(r"runtime.activation_checkpointing=(\w+) data.batch_size=(\d+)", text)
    assert [how for how, _ in offers] == ["pointwise", "blocks"]
    _, largest = measure_masks(config)
    for how, batch in offers:
        changes = [f"data.batch_size={batch}", f"runtime.activation_checkpointing={how}"]
        needed = sum(memory_bytes(load_config(CONFIGS / "in1k_vith14_ep300.yaml", changes), largest, 1, True).values())
        assert int(batch) < 512 or how == "blocks"
        assert 0.7 * 80 * 2**30 < needed <= 0.95 * 80 * 2**30 or int(batch) == 512
    assert "evaluation.measure_start" not in text
    continued = config.model_copy(
        update={"meta": config.meta.model_copy(update={"load_checkpoint": True, "read_checkpoint": "weights.pth.tar"})}
    )
    assert "evaluation.measure_start" in explain_oom(continued, 1, torch.device("cuda:0"), error)
    small = load_config(CONFIGS / "in1k_vith14_ep300.yaml", ["data.batch_size=16"])
    assert "By estimate it should fit: does another process use this GPU" in explain_oom(
        small, 1, torch.device("cuda:0"), error
    )
