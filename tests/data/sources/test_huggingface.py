"""Hugging Face data sets: folders of save_to_disk and of parquet files, splits, columns, and what can be wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.cli.shards import main as make_shards
from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, build_eval_loader, build_loader, check, open_images
from dmtjepa.data.sources.folder import FolderSource
from dmtjepa.evaluation.splits import find_splits
from tests.helpers.images import LOADERS, contents, encode

datasets = pytest.importorskip("datasets")  # imported here once: it takes seconds where it is not cached
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _own_hub_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def rows(image_folder: Path):
    """The images of the folder as a data set."""
    source = FolderSource(image_folder)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.class_names)})
    images = [{"bytes": source.read(image), "path": None} for image in range(len(source))]
    return datasets.Dataset.from_dict({"image": images, "label": source.labels.tolist()}, features=features)


@pytest.fixture(scope="module")
def hub(rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parquet files as it is downloaded from the hub, with two splits, one of them in two files."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "data").mkdir()
    rows.select(range(20)).to_parquet(folder / "data/train-00000-of-00002.parquet")
    rows.select(range(20, 30)).to_parquet(folder / "data/train-00001-of-00002.parquet")
    rows.select(range(6)).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


def test_folders_of_parquet_files_and_of_save_to_disk_hold_the_same(
    image_folder: Path, rows, hub: Path, tmp_path: Path
):
    expected = FolderSource(image_folder)
    rows.save_to_disk(tmp_path / "disk")
    rows.shuffle(seed=0).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    single = hub / "data/test-00000-of-00001.parquet"
    for path in (
        f"hf:{hub}",
        f"hf:{hub}:train",
        f"hf:{tmp_path}/disk",
        f"hf:{tmp_path}/dict",
        f"hf:{tmp_path}/dict:train",
    ):
        source = open_images(path)
        assert contents(source) == contents(expected), path
        assert source.labels.tolist() == expected.labels.tolist()
        assert source.class_names == expected.class_names
        assert [source.size(image) for image in range(30)] == [len(data) for data in contents(expected)]
    assert open_images(f"hf:{hub}").describe() == f"30 images of 3 classes in the split train of hf:{hub}"
    assert contents(open_images(f"hf:{hub}:test")) == contents(open_images(f"hf:{single}")) == contents(expected)[:6]
    assert sorted(contents(open_images(f"hf:{tmp_path}/shuffled"))) == sorted(contents(expected))
    settings = DataSettings(root_path="/datasets", image_folder=f"hf:{hub}:test")
    assert len(open_images(settings.path)) == 6


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_those_of_the_folder(loader: str, settings: DataSettings, hub: Path):
    settings = settings.model_copy(update={"loader": loader, "num_workers": 1})
    ours = settings.model_copy(update={"root_path": f"hf:{hub}"})
    one, other = (build_loader(each, seed=3, rank=1, world_size=2) for each in (settings, ours))
    for expected, batch in zip(one.epoch(1, 1), other.epoch(1, 1), strict=True):  # as after a resume
        assert torch.equal(expected, batch)
    one.close()
    other.close()


def test_corrupt_rows_are_named(tmp_path: Path):
    (tmp_path / "good.png").write_bytes(encode(Image.new("RGB", (9, 9))))
    images = [(b"no image", None), (None, None), (None, "/no.png"), (None, str(tmp_path / "good.png"))]
    features = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}  # no type Image
    rows = {"image": [{"bytes": data, "path": path} for data, path in images]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "bad")
    source = open_images(f"hf:{tmp_path}/bad")
    report = check.check(source, num_workers=2)
    names, reasons = zip(*report.corrupt, strict=True)
    assert names == tuple(f"hf:{tmp_path}/bad[{row}]" for row in range(3))
    assert reasons[0] == "not an image that PIL can read"
    assert reasons[1:] == ("the row holds no image", "No such file or directory")
    assert report.formats == {"PNG": 1}
    assert [source.size(row) for row in range(4)] == [8, -1, -1, (tmp_path / "good.png").stat().st_size]
    assert source.labels is None


def test_shards_and_evaluation(hub: Path, tmp_path: Path):
    assert make_shards([f"hf:{hub}:test", str(tmp_path / "shards")]) == 0
    packed, source = open_images(tmp_path / "shards"), open_images(f"hf:{hub}:test")
    assert contents(packed) == contents(source)
    assert packed.labels.tolist() == source.labels.tolist()
    assert packed.name(0).endswith(".jpeg")
    splits = find_splits(DataSettings(root_path=f"hf:{hub}"))
    assert (len(splits.train), len(splits.validation), splits.unlabelled) == (30, 6, None)
    splits = find_splits(DataSettings(), data=Path(f"hf:{hub}:test"))  # one split alone: a fifth is held out
    assert (len(splits.train), len(splits.validation)) == (5, 1)
    images, labels, names = next(iter(build_eval_loader(f"hf:{hub}:test", 16, 6, num_workers=1)))
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == source.labels.tolist()
    assert names[5] == f"hf:{hub}:test[5]"


def test_columns(tmp_path: Path):
    png = encode(Image.fromarray(np.zeros((8, 8), np.uint8)))
    columns = {"scan": [png] * 4, "thumb": [png] * 4, "text": ["a", "b", "a", "a"], "label": [5, 2, 2, -1]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "columns")
    with pytest.raises(DataError, match=r"2 columns hold images \(scan, thumb\); name one as hf:.*,image=COLUMN"):
        open_images(f"hf:{tmp_path}/columns")
    with pytest.raises(DataError, match="has no column scam; it has scan, thumb, text, label"):
        open_images(f"hf:{tmp_path}/columns,image=scam")
    with pytest.raises(DataError, match="'bild=scan' is not one of config="):
        open_images(f"hf:{tmp_path}/columns,bild=scan")
    source = open_images(f"hf:{tmp_path}/columns,image=scan,label=text")
    assert source.read(3) == png
    assert source.labels.tolist() == [0, 1, 0, 0]
    assert source.class_names == ["a", "b"]
    assert open_images(f"hf:{tmp_path}/columns,image=scan").labels is None  # a label is -1: it is not known


def test_what_cannot_be_opened(hub: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no split val; choose hf:.*:NAME of train, test"):
        open_images(f"hf:{hub}:val")
    with pytest.raises(DataError, match="does not exist"):
        open_images("hf:/no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"hf:.*empty cannot be opened: .*doesn't contain any data files"):
        open_images(f"hf:{tmp_path}/empty")
    with pytest.raises(DataError, match="name a folder or a data set after hf:"):
        open_images("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'dmtjepa\[hf\]'"):
        open_images(f"hf:{hub}")
