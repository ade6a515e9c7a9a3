from pathlib import Path

import numpy as np
import pytest

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError
from dmtjepa.evaluation.splits import find_splits, subsample
from tests.helpers.run_folders import write_images


def test_takes_the_splits_of_the_runs_data(data):
    for path in (data, data / "train"):
        splits = find_splits(DataSettings(root_path=str(path)))
        assert (len(splits.train), len(splits.validation)) == (30, 12)
        assert splits.unlabelled is None
        assert splits.validation.name(0).startswith(str(data / "val"))


def test_a_test_folder_and_a_named_pair_are_validation_splits(tmp_path):
    write_images(tmp_path / "train", 3, seed=0)
    write_images(tmp_path / "test", 2, seed=1)
    assert len(find_splits(DataSettings(), data=tmp_path).validation) == 6
    pair = find_splits(DataSettings(), train=tmp_path / "test", validation=tmp_path / "train")
    assert (len(pair.train), len(pair.validation)) == (6, 9)


def test_one_folder_has_every_fifth_image_held_out(tmp_path):
    write_images(tmp_path, 10, seed=0)
    splits = find_splits(DataSettings(), data=tmp_path)
    assert (len(splits.train), len(splits.validation)) == (24, 6)
    names = {splits.validation.name(i) for i in range(6)}
    assert names.isdisjoint(splits.train.name(i) for i in range(24))
    assert "held out" in splits.description
    assert splits.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_labels_of_validation_are_numbered_as_those_of_training(tmp_path):
    write_images(tmp_path / "train", 3, seed=0)
    write_images(tmp_path / "val", 2, seed=1)
    for image in (tmp_path / "val" / "class0").iterdir():
        image.unlink()
    (tmp_path / "val" / "class0").rmdir()
    splits = find_splits(DataSettings(), data=tmp_path)
    assert splits.validation.labels.tolist() == [1, 1, 2, 2]
    assert splits.validation.read(0) == (tmp_path / "val" / "class1" / "0.png").read_bytes()


def test_refuses_unknown_classes(tmp_path):
    write_images(tmp_path / "train", 3, seed=0)
    write_images(tmp_path / "val", 2, seed=1)
    (tmp_path / "val" / "class2").rename(tmp_path / "val" / "zebra")
    with pytest.raises(DataError, match="zebra"):
        find_splits(DataSettings(), data=tmp_path)


def test_says_why_there_are_no_labels(tmp_path):
    write_images(tmp_path / "flat", 5, seed=0)
    for image in list((tmp_path / "flat").glob("*/*.png")):
        image.rename(tmp_path / "flat" / f"{image.parent.name}-{image.name}")
    assert "folder per class" in find_splits(DataSettings(), data=tmp_path / "flat").unlabelled
    write_images(tmp_path / "one" / "train", 5, seed=0)
    for label in (1, 2):
        (tmp_path / "one" / "train" / f"class{label}").rename(tmp_path / f"away{label}")
    assert "one class" in find_splits(DataSettings(), data=tmp_path / "one" / "train").unlabelled


def test_at_most_so_many_images_of_all_classes(data):
    splits = find_splits(DataSettings(root_path=str(data)), max_images=9)
    assert (len(splits.train), len(splits.validation)) == (9, 9)
    again = find_splits(DataSettings(root_path=str(data)), max_images=9)
    assert [splits.train.name(i) for i in range(9)] == [again.train.name(i) for i in range(9)]
    assert len(set(splits.train.labels.tolist())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": Path("x")}, "both"),
        ({"max_images": 0}, "at least 1"),
        ({"data": Path("no/such/folder")}, "does not exist"),
    ],
)
def test_refuses_what_cannot_be_measured(arguments, message):
    with pytest.raises(DataError, match=message):
        find_splits(DataSettings(), **arguments)


def test_subsample_reaches_every_class(data):
    validation = find_splits(DataSettings(root_path=str(data))).validation
    assert np.unique(subsample(validation, 3).labels).tolist() == [0, 1, 2]
    assert len(subsample(validation, 100)) == 12
