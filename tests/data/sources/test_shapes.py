"""The drawn image set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmtjepa.config import DataSettings
from dmtjepa.data import build_eval_loader, build_loader
from dmtjepa.data.sources.shapes import CLASS_NAMES, ShapesParameters, draw_image, find_shapes

SMALL = ShapesParameters(num_train=40, num_val=20, image_size=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    find_shapes(SMALL, cache)
    return cache


@pytest.mark.slow
def test_files_labels_and_masks(cache: Path):
    folder = find_shapes(SMALL, cache)
    for split, count in (("train", 40), ("val", 20)):
        images = sorted((folder / split).rglob("*.jpg"))
        assert len(images) == count
        for path in images:
            mask = np.asarray(Image.open(folder / "masks" / split / path.parent.name / f"{path.stem}.png"))
            assert Image.open(path).size == (48, 48)
            assert mask.shape == (48, 48)
            assert set(np.unique(mask)) == {0, 1 + CLASS_NAMES.index(path.parent.name)}
            assert 0.03 < (mask > 0).mean() < 0.8
    assert not list(cache.glob(".*"))  # no half-written set is left


def test_drawn_once_and_by_parameters_alone(cache: Path, monkeypatch):
    folder = find_shapes(SMALL, cache)
    monkeypatch.setattr("dmtjepa.data.sources.shapes._write_set", lambda *_: pytest.fail("drawn again"))
    assert find_shapes(SMALL, cache) == folder
    first, mask = draw_image(SMALL, 3, 13)
    again, mask_again = draw_image(SMALL, 3, 13)
    assert np.array_equal(first, again)
    assert np.array_equal(mask, mask_again)
    other, _ = draw_image(ShapesParameters(num_train=40, num_val=20, image_size=48, seed=1), 3, 13)
    assert not np.array_equal(first, other)


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch):
    def fail(parameters: ShapesParameters, folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("dmtjepa.data.sources.shapes._write_set", fail)
    with pytest.raises(KeyboardInterrupt):
        find_shapes(SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_raw_pixels_tell_little_about_the_class():
    parameters = ShapesParameters(image_size=32)
    images = [draw_image(parameters, number % 10, number)[0].reshape(-1) / 255 for number in range(500)]
    features = np.stack(images)
    train, test, labels = features[:400], features[400:], np.arange(500) % 10
    nearest = ((test[:, None, ::7] - train[None, :, ::7]) ** 2).sum(2).argmin(1)
    assert (labels[:400][nearest] == labels[400:]).mean() < 0.3  # chance is 0.1


def test_loaders_find_the_set(cache: Path, monkeypatch):
    monkeypatch.setattr("dmtjepa.data.build.find_shapes", lambda: find_shapes(SMALL, cache))
    loader = build_loader(DataSettings(dataset="shapes", batch_size=8, crop_size=32, num_workers=0), seed=0)
    assert loader.num_images == 40
    assert len(list(loader.epoch(0))) == 5
    evaluation = build_eval_loader("shapes:val", 32, 10)
    assert evaluation.num_images == 20
    assert evaluation.class_names == list(CLASS_NAMES)
