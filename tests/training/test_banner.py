"""What a start says before its first step."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dmtjepa.config import load_config
from dmtjepa.data import open_images
from dmtjepa.masks import MaskSampler, mean_context_sizes
from dmtjepa.training.banner import count_trained, describe_start

CONFIGS = Path(__file__).parents[2] / "configs"


def test_facts_of_a_start(settings, image_folder):
    config = settings(**{"data.batch_size": 8, "runtime.accumulation": 2, "runtime.precision": "bfloat16"})
    facts = {"world_size": 3, "device": torch.device("cpu"), "loader": "dali", "num_parameters": 1_230_000}
    text = describe_start(config, open_images(image_folder), steps_per_epoch=2, **facts)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["images"] == f"128 images below {image_folder}"
    assert lines["loader"] == "DALI, 0 workers for each process"
    assert lines["model"].startswith("vit_tiny, patches of 4 in 32x32 pixels, 1.2 M trained parameters (DMT-JEPA")
    assert lines["device"].startswith("3 x CPU")
    assert lines["device"].endswith("bfloat16")
    assert lines["batch"] == "48 images = 8 x 3 processes x 2 accumulated"
    assert lines["length"] == "3 epochs of 2 steps, 6 in all"
    assert lines["run"] == f"{config.logging.folder}, new"
    resumed = describe_start(config, open_images(image_folder), steps_per_epoch=2, step=4, **facts)
    assert resumed.endswith("resumes at step 4")
    changes = {"optimization.epochs": 1, "optimization.context_loss": 0.5}
    single = settings(**{"data.batch_size": 8, "data.num_workers": 1} | changes)
    text = describe_start(single, open_images(image_folder), steps_per_epoch=1, **facts | {"world_size": 1})
    assert "DALI, 1 worker for each process" in text
    assert "8 images = 8 x 1 process\n" in text
    assert "1 epoch of 1 step, 1 in all" in text
    assert "(DMT-JEPA, patch.query image, context loss 0.5)" in text


def test_a_start_says_that_there_is_nothing_to_load(settings, image_folder):
    """Official files have `load_checkpoint: true` in new runs, too, so that is no error."""
    facts = {"world_size": 1, "device": torch.device("cpu"), "loader": "pil", "num_parameters": 1, "steps_per_epoch": 2}
    for given, step, drawn in ((None, 0, True), (None, 4, False), ("a.pth.tar", 0, False)):
        config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": given})
        text = describe_start(config, open_images(image_folder), step=step, **facts)
        assert ("new, with drawn weights: meta.load_checkpoint is true, but" in text) == drawn


@pytest.mark.parametrize("pack", [False, True])
def test_a_start_tells_how_much_of_an_image_is_seen(image_folder, pack):
    """Of 16 patches, the shortest context of 64 images has 2 or 3, where the images have 6 on average."""
    config = load_config(CONFIGS / "quickstart.yaml", [f"mask.pack={str(pack).lower()}"])
    sampler = MaskSampler.from_config(config)
    mean = sum(sampler.sample(step).context_size for step in range(32)) / 32
    facts = {"world_size": 1, "device": torch.device("cpu"), "loader": "dali", "num_parameters": 1}
    text = describe_start(config, open_images(image_folder), steps_per_epoch=1, **facts)
    line = next(line for line in text.splitlines() if line.startswith("masks"))
    assert f"4 blocks to predict from {mean:.1f} of 16 patches" in line
    assert (mean < 4) == (not pack)
    assert ("mask.pack=true" in line) == (not pack)
    assert line.endswith("on average") == pack


def test_contexts_cut_over_all_processes(image_folder):
    config = load_config(CONFIGS / "quickstart.yaml", ["mask.pack=false", "mask.context_cut=global"])
    sampler = MaskSampler.from_config(config)
    mean = sum(sampler.sample(step, 0, 4).context_size for step in range(8)) / 8
    assert mean < sum(sampler.sample(step).context_size for step in range(8)) / 8
    assert mean_context_sizes(config, 4, num_steps=8)[0] == mean
    facts = {"device": torch.device("cpu"), "loader": "dali", "num_parameters": 1, "steps_per_epoch": 1}
    text = describe_start(config, open_images(image_folder), world_size=4, **facts)
    assert f"from {mean:.1f} of 16" in text


def test_official_masks_need_no_packing():
    config = load_config(CONFIGS / "in1k_vith14_ep300.yaml", ["data.root_path=/datasets"])
    size, whole = mean_context_sizes(config)
    assert whole / 2 < size < whole


def test_the_teacher_is_not_trained():
    model = nn.ModuleDict({"student": nn.Linear(2, 3), "teacher": nn.Linear(2, 3).requires_grad_(False)})
    assert count_trained(model) == 9
