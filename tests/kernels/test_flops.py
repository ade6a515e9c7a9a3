"""FLOPs that a training step really executes, counted on tensors without memory."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa import kernels
from dmtjepa.config import load_config
from dmtjepa.masks import MaskBatch
from dmtjepa.objective import build_model
from dmtjepa.training.estimate import measure_masks, step_flops

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH = 4


def count_step(config, shapes, device_type):
    """(FLOPs per image of a step at these mask shapes, executed operators of this project)."""
    height, width = config.data.image_size
    with torch.device("meta"):
        model = build_model(config, device_type).to(torch.bfloat16)
        images = torch.empty(BATCH, 3, height, width, dtype=torch.uint8)

        def index(*shape):
            return torch.empty(shape, dtype=torch.int64)

        num_blocks, num_context, num_targets = config.mask.num_pred_masks, round(shapes.context), round(shapes.target)
        masks = MaskBatch(
            context_index=index(BATCH, num_context),
            target_index=index(BATCH, num_blocks, num_targets),
            target_unique=index(round(BATCH * shapes.unique)),
            target_slot=index(BATCH, num_blocks, num_targets),
            neighborhood=index(round(BATCH * shapes.neighborhood)),
            window=config.patch.patch_k_size,
            border=config.patch.border,
        )
        with FlopCounterMode(display=False) as counter:
            model(images, masks).backward()
    return counter.get_total_flops() / BATCH, counter.get_flop_counts()["Global"]


# GFLOP per image: ViT-H/14, L/16 and B/16 at the mean shape of the official sampler and the official batch per device.
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xformers", "sdpa"])
@pytest.mark.parametrize(
    ("name", "most"), [("in1k_vith14_ep300", 680), ("in1k_vitl16_ep600", 267), ("in1k_vitb16_ep600", 89)]
)
def test_a_step_executes_no_more_than_the_lean_count(name, most, attention):
    config = load_config(CONFIGS / f"{name}.yaml", [f"runtime.attention={attention}"])
    shapes, _ = measure_masks(config, num_steps=32)
    counted, by_operator = count_step(config, shapes, "cuda")
    assert counted <= most * 1e9
    predicted = sum(step_flops(config, shapes).values())
    assert counted == pytest.approx(predicted, rel=0.002)
    attentions = {str(name) for name in by_operator if "attention" in str(name) or "flash" in str(name)}
    assert (attentions == {"xformers_flash.flash_fwd", "xformers_flash.flash_bwd"}) == (attention == "xformers")


def test_every_operator_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    with torch.device("meta"):
        h, rows = torch.empty(2, 36, 16), torch.empty(10, 16)
        neighbor_index, index = torch.empty(10, 4, dtype=torch.int64), torch.empty(10, dtype=torch.int64)
        score = torch.empty(10, 2)
        with FlopCounterMode(display=False) as counter:
            kernels.select_neighbors(h, index, (6, 6), num_neighbors=4, window=3, border="wrap")
        assert counter.get_total_flops() == 10 * 16 * 2 * (8 + 9)
        with FlopCounterMode(display=False) as counter:
            kernels.aggregate_neighbors(rows, rows, rows, rows, rows, neighbor_index, num_heads=2)
        assert counter.get_total_flops() == 10 * 5 * 16 * 4
        with FlopCounterMode(display=False) as counter:
            kernels.pool_neighbors(score[:2], rows[:2], score, rows, neighbor_index, index)
        assert counter.get_total_flops() == 10 * 5 * 16 * 2
    registered = {str(packet) for packet in flop_registry if str(packet).startswith("dmtjepa.")}
    defined = {name.replace("::", ".").partition(".default")[0] for name in _operators()}
    assert defined <= registered


def _operators():
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name for schema in schemas if schema.name.startswith("dmtjepa::")}
