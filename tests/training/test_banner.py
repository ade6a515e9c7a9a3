"""What a start says before its first step."""

import torch
from torch import nn

from dmtjepa.data import open_images
from dmtjepa.training.banner import count_trained, describe_start


def test_facts_of_a_start(settings, image_folder):
    config = settings(**{"data.batch_size": 8, "runtime.accumulation": 2, "runtime.precision": "bfloat16"})
    facts = {"world_size": 3, "device": torch.device("cpu"), "loader": "dali", "num_parameters": 1_230_000}
    text = describe_start(config, open_images(image_folder), steps_per_epoch=2, **facts)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["images"] == f"128 images below {image_folder}"
    assert lines["loader"] == "dali, 0 workers for each process"
    assert lines["model"].startswith("vit_tiny, patches of 4 in 32x32 pixels, 1.2 M trained parameters (DMT-JEPA")
    assert lines["device"].startswith("3 x CPU")
    assert lines["device"].endswith("bfloat16")
    assert lines["batch"] == "48 images = 8 x 3 processes x 2 accumulated"
    assert lines["length"] == "3 epochs of 2 steps, 6 in all"
    assert lines["run"] == f"{config.logging.folder}, new"
    resumed = describe_start(config, open_images(image_folder), steps_per_epoch=2, step=4, **facts)
    assert resumed.endswith("resumes at step 4")
    single = settings(**{"data.batch_size": 8, "data.num_workers": 1, "optimization.epochs": 1})
    text = describe_start(single, open_images(image_folder), steps_per_epoch=1, **facts | {"world_size": 1})
    assert "dali, 1 worker for each process" in text
    assert "8 images = 8 x 1 process\n" in text
    assert "1 epoch of 1 step, 1 in all" in text


def test_the_teacher_is_not_trained():
    model = nn.ModuleDict({"student": nn.Linear(2, 3), "teacher": nn.Linear(2, 3).requires_grad_(False)})
    assert count_trained(model) == 9
