"""An evaluation that several ranks share has the results of one rank alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.config import parse_config
from dmtjepa.evaluation.context import EvaluationContext
from dmtjepa.evaluation.errors import EvaluationError, EvaluationStopped
from dmtjepa.evaluation.evaluator import Evaluator, open_splits
from dmtjepa.evaluation.figure_data import load_shown
from dmtjepa.evaluation.ranks import Failure, Ranks
from dmtjepa.evaluation.splits import find_splits
from dmtjepa.models import ARCHITECTURES, VisionTransformer
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
def test_no_nearest_images_are_shown_if_one_cannot_be_read(data, tmp_path, caplog):
    """Features have no place for it, and would belong to the images after it. The log names each image once."""
    images = Path(shutil.copytree(data, tmp_path / "images"))
    shown = images / "val" / "class0" / "0.png"
    shown.write_bytes(b"no image")
    for expected in (True, False):
        evaluator, encoders = build(images, Ranks())
        evaluator.measure({"teacher": encoders["teacher"]})
        assert ("nearest" in evaluator.draw(encoders["teacher"], masks=False)) == expected
        assert sum(str(shown) in record.message for record in caplog.records) == 1
        caplog.clear()
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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EvaluationError("masks hold void"), "masks hold void"),
        (torch.linalg.LinAlgError("not converged"), "LinAlgError: not converged"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (MemoryError(), "MemoryError; a lower evaluation.batch_size or evaluation.max_images needs less"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_task_that_fails_leaves_the_others_alone(error, reason):
    def fail():
        raise error

    assert Ranks().run([lambda: 1, fail, lambda: 3]) == [1, Failure(reason), 3]
    with pytest.raises(EvaluationError, match=re.escape(reason)):
        Ranks().together(fail)


@pytest.mark.parametrize("error", [KeyError("missing"), ValueError("x"), TypeError("no"), AttributeError("none")])
def test_mistakes_of_the_program_are_raised(error):
    def fail():
        raise error

    for work in (Ranks().together, lambda task: Ranks().run([task])):
        with pytest.raises(type(error)) as raised:
            work(fail)
        assert raised.value is error


def test_nothing_is_begun_after_a_stop_signal():
    ranks = Ranks(is_stopped=lambda: True)
    for work in (ranks.together, lambda task: ranks.run([task])):
        with pytest.raises(EvaluationStopped):
            work(lambda: pytest.fail("begun"))


@pytest.mark.parametrize("settings", [{"max_megapixels": 0.001}, {"max_value": 1000}, {"channels": 1}])
def test_every_evaluation_reads_images_as_the_settings_say(tmp_path: Path, settings: dict):
    """That of the report, its figures, and that during training."""
    config = parse_config({"data": {"root_path": str(tmp_path), "crop_size": 16} | settings, "mask": {"patch_size": 8}})
    image = Image.fromarray(np.full((50, 50), 1000, np.uint16))  # 2,500 pixels, of which 1,000 is white
    for path in (tmp_path / split / name / "0.png" for split in ("train", "val") for name in "ab"):
        path.parent.mkdir(parents=True)
        image.save(path)
    splits = find_splits(config.data)
    context = EvaluationContext(config, {}, splits, progress=False)
    seen: list[torch.Tensor] = []
    encoder = VisionTransformer(16, 8, num_channels=config.data.channels, **ARCHITECTURES["vit_nano"])
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    Evaluator(config, splits, Ranks())._read({"teacher": encoder}, splits.validation, dense=False)
    found = [*seen, *(images for images, _, _ in context.build_loader(splits.validation)), load_shown(context)[0]]
    if "max_megapixels" in settings:
        assert not any(map(len, found))
        return
    assert [tuple(images.shape) for images in found] == [(2, config.data.channels, 16, 16)] * 3
    assert {int(images.max()) for images in found} == {255 if "max_value" in settings else 4}
