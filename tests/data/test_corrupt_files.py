"""Everything that turns up in image folders: used as it should be, or skipped and named, by both loaders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtjepa.config import DataSettings
from dmtjepa.data import build_loader
from dmtjepa.data.check import check
from dmtjepa.data.decode import CorruptImage, decode_image
from dmtjepa.data.jpeg_header import read_plain_size
from dmtjepa.data.sources.folder import FolderSource
from tests.helpers.image_kinds import list_kinds
from tests.helpers.images import LOADERS, encode, flip_bytes, needs_dali, smooth_image


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A folder of all kinds, and the names of the corrupt files."""
    folder = tmp_path_factory.mktemp("damaged")
    corrupt = set()
    kinds = list(list_kinds())
    assert sum(is_corrupt for _, _, is_corrupt in kinds) >= 200
    for name, data, is_corrupt in kinds:
        assert not (folder / name).exists()
        (folder / name).write_bytes(data)
        corrupt |= {name} if is_corrupt else set()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")  # no file: not listed, and never read
    (folder / "folder.jpg").mkdir()
    return folder, corrupt | {"gone.jpg", "loop.jpg"}


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
def test_an_epoch_survives_with_the_right_counts(damaged: tuple[Path, set[str]], loader_name: str):
    folder, corrupt = damaged
    num_images = len(FolderSource(folder))
    settings = DataSettings(
        root_path=str(folder), batch_size=1, crop_size=32, num_workers=2, loader=loader_name, max_broken=1
    )
    batch = next(size for size in (8, 7, 6, 5, 4, 3, 2, 1) if num_images % size == 0)
    loader = build_loader(settings.model_copy(update={"batch_size": batch}), seed=0)
    shapes = [tuple(images.shape) for images in loader.epoch(0)]
    named = [Path(name).name for name, _ in loader.corrupt]
    loader.close()
    assert shapes == [(batch, 3, 32, 32)] * (num_images // batch)
    assert len(named) == len(set(named))
    assert set(named) == corrupt


@pytest.mark.slow
@needs_dali
def test_loaders_agree_on_every_whole_kind(damaged: tuple[Path, set[str]]):
    folder, _ = damaged
    batches = []
    for name in ("pil", "dali"):
        settings = DataSettings(
            root_path=str(folder), batch_size=16, crop_size=32, num_workers=2, loader=name, max_broken=1
        )
        loader = build_loader(settings, seed=5)
        batches.append(torch.cat(list(loader.epoch(0))).int())
        loader.close()
    difference = (batches[0] - batches[1]).abs().flatten(1).float()
    assert difference.mean(1).max() < 1.5
    assert difference.max() <= 24


@pytest.mark.slow
def test_check_reports_the_same(damaged: tuple[Path, set[str]]):
    folder, corrupt = damaged
    report = check(FolderSource(folder), num_workers=2)
    assert {Path(name).name for name, _ in report.corrupt} == corrupt
    assert report.formats.total() == report.num_images - len(corrupt)
    text = str(report)
    assert "JPEG" in text
    assert f"corrupt     {len(corrupt)}" in text


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
def test_files_deleted_during_the_run_are_skipped(tmp_path: Path, loader_name: str):
    rng = np.random.default_rng(0)
    for number in range(40):
        smooth_image(rng, 40, 40).save(tmp_path / f"{number:02d}.jpg")
    settings = DataSettings(
        root_path=str(tmp_path), batch_size=4, crop_size=32, num_workers=1, loader=loader_name, max_broken=0.5
    )
    loader = build_loader(settings, seed=0)
    assert len(list(loader.epoch(0))) == 10
    for number in range(10):
        (tmp_path / f"{number:02d}.jpg").unlink()
    assert len(list(loader.epoch(1))) == 10
    list(loader.epoch(2))
    loader.close()
    assert {Path(name).name for name, _ in loader.corrupt} <= {f"{number:02d}.jpg" for number in range(10)}
    assert len(loader.corrupt) == 10
    assert {reason for _, reason in loader.corrupt} == {"No such file or directory"}


def fuzzed(count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    images = [smooth_image(rng, 160, 120) for _ in range(4)]
    whole = [encode(image, "JPEG", progressive=bool(n % 2)) for n, image in enumerate(images)]
    return [flip_bytes(whole[number % 4], rng) for number in range(count)]


def test_a_thousand_fuzzed_files_decode_or_are_refused():
    outcomes = set()
    for data in fuzzed(1000, seed=1):
        plain = read_plain_size(data)
        try:
            image = decode_image(data)
            outcomes.add("decoded")
            assert plain is None or plain == image.size
        except CorruptImage:
            outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
def test_a_thousand_fuzzed_files_neither_crash_nor_hang_a_loader(tmp_path: Path, loader_name: str):
    for number, data in enumerate(fuzzed(1000, seed=2)):
        (tmp_path / f"{number:04d}.jpg").write_bytes(data)
    settings = DataSettings(
        root_path=str(tmp_path), batch_size=20, crop_size=24, num_workers=2, loader=loader_name, max_broken=1
    )
    loader = build_loader(settings, seed=0)
    assert sum(len(images) for images in loader.epoch(0)) == 1000
    assert 50 < len(loader.corrupt) < 950
    loader.close()
