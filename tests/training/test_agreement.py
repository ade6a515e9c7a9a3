"""Ranks that see other images, settings or weights than rank 0 are named before anything is trained."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmtjepa.config import change_settings
from dmtjepa.data import open_images
from dmtjepa.errors import UserError
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.agreement import check_ranks_agree, check_weights_agree
from dmtjepa.training.checkpoint_writer import CheckpointWriter
from dmtjepa.training.distributed import new_gloo_group, process_group
from dmtjepa.training.evaluation import PeriodicEvaluation
from dmtjepa.training.launch import run_process
from dmtjepa.training.setup import load_initial_weights
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


def compare(config, paths, others, folders):
    """Compare each of `paths` on rank 0 with itself, then with the other source, loader and settings of rank 1.

    Then what each rank finds in its own working folder, as if that were one path on two nodes.
    """
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=600) as world:
        for path, other in zip(paths, others, strict=True):
            check_ranks_agree(config, open_images(path), "pil", world)
            mine = (path, "pil", config) if world.rank == 0 else other
            expect_refusal(check_ranks_agree, mine[2], open_images(mine[0]), mine[1], world)
        os.chdir(folders[world.rank])
        check_weights_agree(Path("same.pth.tar"), world)
        folder = RunFolder.from_config(config)
        for name in ("other.pth.tar", "longer.pth.tar"):
            meta = config.meta.model_copy(update={"load_checkpoint": True, "read_checkpoint": name})
            own = config.model_copy(update={"meta": meta})
            expect_refusal(load_initial_weights, None, own, folder, world)
        for name in ("same", "other", "fewer"):
            evaluation = config.evaluation.model_copy(update={"every_epochs": 1, "data": name})
            own = config.model_copy(update={"evaluation": evaluation})
            arguments = own, world, *(None,) * 6  # the others are not used yet
            if name == "same":
                PeriodicEvaluation(*arguments)
            else:
                expect_refusal(PeriodicEvaluation, *arguments)
        logging.basicConfig(level=logging.INFO, force=True)
        for name in ("same", "other", "absent"):  # nobody has asked: a run goes on without
            start = {"meta.load_checkpoint": True, "meta.read_checkpoint": "same.pth.tar", "evaluation.data": name}
            own = change_settings(config, start)
            evaluation = PeriodicEvaluation(own, world, None, None, SimpleNamespace(step=0), None, None, None)
            assert evaluation.is_due() == (name == "same")
        writer = CheckpointWriter(Path("run", "checkpoints"), new_gloo_group(world), 2, world.device)
        writer.save({f"rank{world.rank}": torch.ones(4)}, {"step": 1})
        expect_refusal(writer.close)


def expect_refusal(check, *arguments):
    try:
        check(*arguments)
    except UserError as error:
        print(f"REFUSED {error}", file=os.fdopen(os.dup(2), "w"), flush=True)
    else:
        raise AssertionError("not noticed")


def write_files(folder, images, rank):
    """A run folder, weights, and images to evaluate on; some of them are other ones on rank 1."""
    (folder / "run").mkdir(parents=True)
    for name, contents in (("same", "a"), ("other", "ab"[rank]), ("longer", "a" * (rank + 1))):
        (folder / f"{name}.pth.tar").write_text(contents)
    for name in ("same", "other", "fewer"):
        for split in ("train", "val"):
            for number in range(4):
                path = folder / name / split / f"class{number % 2}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(images / "000.png", path)
    if rank == 1:
        (folder / "other" / "val" / "class0" / "0.png").rename(folder / "other" / "val" / "class0" / "1.png")
        (folder / "fewer" / "train" / "class0" / "0.png").unlink()
    else:
        shutil.copytree(folder / "same", folder / "absent")  # not on rank 1
    return folder


@pytest.mark.slow
def test_what_ranks_must_have_in_common_is_compared(settings, image_folder, tmp_path):
    names = [f"{image_folder}/{number:03d}.png\n" for number in range(20)]
    (tmp_path / "list.txt").write_text("".join(names))
    (tmp_path / "turned.txt").write_text("".join(names[:5] + names[:4:-1]))
    config = settings()
    other_rate = settings(**{"optimization.lr": 0.5, "data.num_workers": 3, "data.root_path": "/elsewhere"})
    others = [
        (tmp_path / "turned.txt", "pil", config),
        (image_folder, "dali", config),
        (image_folder, "pil", other_rate),
    ]
    folders = [write_files(tmp_path / f"{rank}", image_folder, rank) for rank in range(2)]
    paths = [tmp_path / "list.txt", image_folder, image_folder]
    ended = run_ranks(compare, 2, tmp_path, config, paths, others, folders)
    for rank, (code, log) in enumerate(ended):
        assert code == 0, log
        assert log.count("the weights that the run starts from are not measured. ") == (2 if rank == 0 else 0)
        assert ("evaluation.data: absent does not exist" in log) == (rank == 0)  # what rank 1 has found
        refused = log.split("REFUSED ")[1:]
        assert "20 images and not 20: the same names in another order, from image 5 on" in refused[0]
        assert "the loader dali and not pil (data.loader)" in refused[1]
        assert "optimization.lr is 0.5 and not 0.002" in refused[2]
        assert "num_workers" not in refused[2]
        assert "root_path" not in refused[2]
        assert "other.pth.tar has other contents\n" in refused[3]
        assert "(meta.read_checkpoint)" in refused[3]
        assert "longer.pth.tar has 2 bytes and not 1\n" in refused[4]
        assert ": other names or labels of validation images\n" in refused[5]
        assert "(evaluation.data)" in refused[5]
        assert ": 3 training images and not 4\n" in refused[6]
        assert "rank 0 does not see __1_0.distcp, which another rank has written; all nodes must share" in refused[7]
        assert len(refused) == 8
        assert all("rank 1 of 2 on " in text for text in refused[:7])
    assert list((folders[0] / "run" / "checkpoints").iterdir()) == []
