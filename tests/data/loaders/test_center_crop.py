"""The evaluation loader: every image once, in order, with its label."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dmtjepa.data import build_eval_loader
from dmtjepa.data.crop import crop_center


def test_all_images_in_order_with_labels(image_folder: Path):
    loader = build_eval_loader(image_folder, 24, 8)
    batches = list(loader)
    assert len(loader) == 4
    assert loader.num_images == 30
    assert [len(names) for _, _, names in batches] == [8, 8, 8, 6]
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (3, 24, 24) for images, _, _ in batches)
    names = [name for _, _, batch in batches for name in batch]
    assert names == sorted(str(path) for path in image_folder.rglob("*.jpg"))
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels.dtype == torch.int64
    assert [loader.class_names[label] for label in labels] == [
        Path(name).relative_to(image_folder).parts[0] for name in names
    ]
    parallel = build_eval_loader(str(image_folder), 24, 8, num_workers=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, parallel, strict=True))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (32, 32), (224, 20)])
def test_center_crop_is_torchvisions(size: tuple[int, int]):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = crop_center(image, (28, 28))
    expected = F.center_crop(F.resize(image, 32), [28, 28])
    assert ours.shape == (28, 28, 3)
    # torchvision cuts the longer side down to whole pixels, we round: at most one pixel more or less of it
    assert abs(int(ours.mean()) - int(np.asarray(expected).mean())) <= 2
    if size[0] == size[1]:
        assert np.array_equal(ours, np.asarray(expected))


def test_an_image_of_the_crops_size_is_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(crop_center(Image.fromarray(pixels), (32, 32)), pixels)
    assert crop_center(Image.fromarray(pixels[:20]), (32, 32)).shape == (32, 32, 3)


def test_corrupt_images_are_left_out(image_folder: Path, tmp_path: Path, caplog):
    """Loaders that share `named` name them once."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "ant" / "000.jpg").write_bytes(b"oh")
    named: set[str] = set()
    list(build_eval_loader(tmp_path / "images", 16, 8, named=named))
    loader = build_eval_loader(tmp_path / "images", 24, 8, named=named)
    assert sum(len(names) for _, _, names in loader) == 29
    assert [Path(name).name for name, _ in loader.corrupt] == ["000.jpg"]
    assert named == {name for name, _ in loader.corrupt}
    assert [record.message for record in caplog.records if "left out a corrupt image" in record.message] == [
        f"left out a corrupt image: {tmp_path}/images/ant/000.jpg: not an image that PIL can read"
    ]


@pytest.mark.parametrize("size", [(2000, 20), (1, 2000), (2, 12_000), (9000, 3)])
def test_a_long_image_is_cut_before_it_is_resized(size: tuple[int, int], monkeypatch):
    """Resized as a whole, an image of 2x12000 would become 224x1344000."""
    resized = []
    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *rest: resized.append(to) or original(self, to, *rest))
    assert crop_center(Image.new("RGB", size), (224, 224)).shape == (224, 224, 3)
    assert resized[0][0] * resized[0][1] < 4 * 224 * 256 * 8


@pytest.mark.parametrize("size", [(3000, 60), (60, 3000), (700, 30)])
def test_the_pixels_of_a_long_image_are_those_of_its_middle(size: tuple[int, int]):
    small = np.random.default_rng(0).integers(0, 256, (max(2, size[1] // 10), max(2, size[0] // 10), 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    fit = 28 / min(size)
    scale = fit * min(256 / 224, max(1, 1 / fit))
    whole = image.resize((max(28, round(size[0] * scale)), max(28, round(size[1] * scale))), Image.Resampling.BILINEAR)
    left, top = (whole.width - 28) // 2, (whole.height - 28) // 2
    expected = np.asarray(whole.crop((left, top, left + 28, top + 28)), int)
    ours = crop_center(image, (28, 28)).astype(int)
    assert np.abs(ours - expected).mean() < 12  # up to half a pixel apart
