"""An evaluation that several ranks share has the results of one rank alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dmtjepa.config import parse_config
from dmtjepa.evaluation.evaluator import Evaluator, open_splits
from dmtjepa.evaluation.ranks import Ranks
from dmtjepa.models import VisionTransformer
from dmtjepa.objective import build_model
from dmtjepa.training.distributed import new_gloo_group, process_group
from tests.helpers.ranks import run_ranks


def build(data: Path, ranks: Ranks) -> tuple[Evaluator, dict[str, VisionTransformer]]:
    config = parse_config(
        {
            "data": {"root_path": str(data), "crop_size": 32},
            "mask": {"patch_size": 8, "min_keep": 0},
            "meta": {"model_name": "vit_nano", "pred_depth": 1, "pred_emb_dim": 48},
            "evaluation": {"batch_size": 3},
        }
    )
    torch.manual_seed(0)
    model = build_model(config)
    encoders = {"teacher": model.teacher_encoder, "student": build_model(config).encoder}
    return Evaluator(config, open_splits(config), ranks), encoders


def measure(data: Path, ranks: Ranks) -> dict[str, float]:
    evaluator, encoders = build(data, ranks)
    return evaluator.measure(encoders)


def measure_on_ranks(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        numbers = measure(data, Ranks(world.rank, world.world_size, new_gloo_group(world)))
        (out / f"{world.rank}.json").write_text(json.dumps(numbers))


@pytest.mark.slow
def test_shared_by_ranks_equals_alone(data, tmp_path):
    images = Path(shutil.copytree(data, tmp_path / "images"))
    (images / "val" / "class0" / "0.png").write_bytes(b"no image")  # is left out
    alone = measure(images, Ranks())
    assert alone["train_images"] == 30
    assert alone["images"] == 11
    names = {f"block{block}/linear" for block in (1, 2, 3)}  # of 4
    assert names | {"linear", "knn_10", "knn_20_layout", "linear_layout", "miou", "student/miou"} <= alone.keys()
    assert alone["linear"] > 0.5  # colours tell the classes apart
    assert [end for end in run_ranks(measure_on_ranks, 3, tmp_path, images, tmp_path) if end[0]] == []
    for rank in range(3):
        shared = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shared == pytest.approx(alone)
        assert list(shared) == list(alone)


@pytest.mark.slow
def test_no_nearest_images_are_shown_if_one_cannot_be_read(data, tmp_path):
    """Features have no place for it, and would belong to the images after it."""
    images = Path(shutil.copytree(data, tmp_path / "images"))
    for expected in (True, False):
        evaluator, encoders = build(images, Ranks())
        evaluator.measure({"teacher": encoders["teacher"]})
        assert ("nearest" in evaluator.draw(encoders["teacher"], masks=False)) == expected
        (images / "train" / "class0" / "0.png").write_bytes(b"no image")


def test_parts_of_a_source_are_the_source(data):
    class Source:
        labels, class_names = None, ()

        def __len__(self):
            return 6

        def name(self, image):
            return f"{image}.png"

    parts = [Ranks(rank, 4).take_part(Source()) for rank in range(4)]
    names = [part.name(image) for part in parts for image in range(len(part))]
    assert names == [f"{image}.png" for image in range(6)]


def test_tasks_and_rows_of_one_rank_need_no_group():
    ranks = Ranks()
    assert ranks.run([lambda: 1, lambda: 2]) == [1, 2]
    assert ranks.gather_on(0, [torch.ones(2, 3), torch.zeros(1, 3)]).shape == (3, 3)
    assert len(ranks.gather_on(0, [])) == len(ranks.gather([])) == 0
