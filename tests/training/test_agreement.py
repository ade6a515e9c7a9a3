"""Ranks that see other images, or other settings, than rank 0 are named before anything is trained."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from dmtjepa.data import open_images
from dmtjepa.training.agreement import check_ranks_agree
from dmtjepa.training.distributed import DistributedError, process_group
from dmtjepa.training.launch import run_process
from tests.helpers.ranks import run_ranks


def train(config, folders):
    root = {"root_path": str(folders[int(os.environ["RANK"])])}
    run_process(config.model_copy(update={"data": config.data.model_copy(update=root)}), "cpu")


@pytest.mark.slow
def test_a_rank_that_lists_other_images_ends_the_run_before_its_first_step(settings, image_folder, tmp_path):
    stale = Path(shutil.copytree(image_folder, tmp_path / "stale", copy_function=os.link))
    (stale / "077.png").unlink()
    config = settings(**{"data.batch_size": 8, "optimization.epochs": 1, "optimization.warmup": 0})
    ended = run_ranks(train, 2, tmp_path, config, [image_folder, stale])
    for code, log in ended:
        assert code == 1
        assert "rank 1 of 2 on " in log
        assert "127 images and not 128: 1 removed (077.png)" in log
    assert [path.name for path in config.logging.path.iterdir()] == [".lock"]


def compare(config, paths, others):
    """Compare each of `paths` on rank 0 with itself, then with the other source, loader and settings of rank 1."""
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=600) as world:
        for path, other in zip(paths, others, strict=True):
            check_ranks_agree(config, open_images(path), "torchvision", world)
            mine = (path, "torchvision", config) if world.rank == 0 else other
            try:
                check_ranks_agree(mine[2], open_images(mine[0]), mine[1], world)
                raise AssertionError("not noticed")
            except DistributedError as error:
                print(f"REFUSED {error}", file=os.fdopen(os.dup(2), "w"), flush=True)


@pytest.mark.slow
def test_order_loader_and_settings_of_all_ranks_are_compared(settings, image_folder, tmp_path):
    names = [f"{image_folder}/{number:03d}.png\n" for number in range(20)]
    (tmp_path / "list.txt").write_text("".join(names))
    (tmp_path / "turned.txt").write_text("".join(names[:5] + names[:4:-1]))
    config = settings()
    other_rate = settings(**{"optimization.lr": 0.5, "data.num_workers": 3, "data.root_path": "/elsewhere"})
    others = [
        (tmp_path / "turned.txt", "torchvision", config),
        (image_folder, "dali", config),
        (image_folder, "torchvision", other_rate),
    ]
    ended = run_ranks(compare, 2, tmp_path, config, [tmp_path / "list.txt", image_folder, image_folder], others)
    for code, log in ended:
        assert code == 0, log
        refused = log.split("REFUSED ")[1:]
        assert "20 images and not 20: the same names in another order, from image 5 on" in refused[0]
        assert "the loader dali and not torchvision (data.loader)" in refused[1]
        assert "optimization.lr is 0.5 and not 0.002" in refused[2]
        assert "num_workers" not in refused[2]
        assert "root_path" not in refused[2]
        assert all("rank 1 of 2 on " in text for text in refused)
