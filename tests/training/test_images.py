"""A resumed run notices other images and another loader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.checkpoint_format import CheckpointError
from dmtjepa.data import open_images
from dmtjepa.data.fingerprint import ImageList, describe_change
from dmtjepa.data.loaders.pil import PilLoader
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.images import check_images
from dmtjepa.training.launch import launch


def add(folder, name, shade=0):
    generator = np.random.default_rng(shade)
    pixels = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(folder / name)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(18):
        add(folder, f"{number:02d}.png", number)
    return folder


CHANGES = {
    "2 added (a.png, b.png)": lambda folder: [add(folder, name) for name in ("a.png", "b.png")],
    "1 removed (03.png)": lambda folder: (folder / "03.png").unlink(),
    "1 added (z.png), 1 removed (00.png)": lambda folder: (folder / "00.png").rename(folder / "z.png"),
    "18 of another size (00.png, 01.png, 02.png, ...)": lambda folder: [
        path.write_bytes(path.read_bytes() + b"more") for path in folder.iterdir()
    ],
}


@pytest.mark.parametrize("expected", CHANGES)
def test_a_change_is_described_from_the_list_that_was_kept(folder, tmp_path, expected):
    before = ImageList.of(open_images(folder))
    before.write(tmp_path / "list.gz")
    kept = ImageList.read(tmp_path / "list.gz")
    assert kept.fingerprint("dali") == before.fingerprint("dali")
    CHANGES[expected](folder)
    now = ImageList.of(open_images(folder))
    assert now.fingerprint("dali") != before.fingerprint("dali")
    assert describe_change(kept, now) == expected


def test_a_folder_that_was_moved_is_the_same(folder, tmp_path):
    before = ImageList.of(open_images(folder)).fingerprint("dali")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert ImageList.of(open_images(moved)).fingerprint("dali") == before


def test_another_order_of_a_list_is_noticed(folder, tmp_path):
    names = [f"images/{number:02d}.png\n" for number in range(18)]
    path = tmp_path / "list.txt"
    path.write_text("".join(names))
    before = ImageList.of(open_images(path))
    path.write_text("".join(names[:5] + names[:4:-1]))
    assert (
        describe_change(before, ImageList.of(open_images(path))) == "the same names in another order, from image 5 on"
    )


def test_damaged_list_is_no_list(tmp_path):
    assert ImageList.read(tmp_path / "none.gz") is None
    (tmp_path / "list.gz").write_bytes(b"\x1f\x8b\x08")
    assert ImageList.read(tmp_path / "list.gz") is None


def test_a_checkpoint_may_name_the_loader_as_earlier_versions_did(folder, settings, monkeypatch):
    config, source = settings(**{"data.root_path": str(folder)}), open_images(folder)
    now = ImageList.of(source).fingerprint("pil")
    recorded = {"images": now.to_meta() | {"loader": "torchvision"}}
    monkeypatch.setattr("dmtjepa.training.images.read_meta", lambda checkpoint: recorded)
    arguments = config, RunFolder.from_config(config), source
    assert check_images(*arguments, "pil", Path("step-8")) == now
    with pytest.raises(CheckpointError, match="the loader: pil there, dali now"):
        check_images(*arguments, "dali", Path("step-8"))


@pytest.mark.slow
def test_resume_with_other_images_is_refused_until_it_is_allowed(folder, settings, losses, monkeypatch):
    def config(**changes):
        values = {"data.root_path": str(folder), "optimization.epochs": 2, "optimization.warmup": 0}
        return settings(
            **values | {"data.batch_size": 8, "data.loader": "auto", "runtime.save_every_steps": 1} | changes
        )

    def stop(loader, epoch, step=0, epoch_of=PilLoader.epoch):
        for number, images in enumerate(epoch_of(loader, epoch, step)):
            if epoch == 1 and number + step == 1:
                raise KeyError("stopped here")
            yield images

    monkeypatch.setattr("dmtjepa.data.build.is_dali_installed", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(PilLoader, "epoch", stop)
        with pytest.raises(KeyError, match="stopped here"):
            launch(config(), ["cpu"])
    (folder / "00.png").rename(folder / "z.png")
    rows = losses(config())
    with pytest.raises(CheckpointError, match=r"1 added \(z.png\), 1 removed \(00.png\)\. Restore it, or set"):
        launch(config(), ["cpu"])
    assert losses(config()) == rows  # nothing was written
    (folder / "z.png").rename(folder / "00.png")
    with monkeypatch.context() as patch:
        patch.setattr(PilLoader, "name", "dali")
        with pytest.raises(CheckpointError, match="the loader: pil there, dali now"):
            launch(config(), ["cpu"])
    (folder / "00.png").rename(folder / "z.png")
    assert launch(config(**{"data.allow_changed": True}), ["cpu"]) == 0
    assert len(losses(config())) == 4
