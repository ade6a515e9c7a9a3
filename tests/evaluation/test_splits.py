from pathlib import Path

import numpy as np
import pytest
import torch

import dmtjepa
from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, open_images
from dmtjepa.data.make_shards import make_shards
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.splits import find_splits, subsample
from dmtjepa.models import ARCHITECTURES, VisionTransformer
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


def write_sizes(folder, sizes):
    """Images of class0, class1, ..., as many as `sizes` says."""
    for label, size in enumerate(sizes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(size):
            (folder / f"class{label}" / f"{number:02}.png").write_bytes(b"not read")


def test_images_are_held_out_within_classes(tmp_path):
    write_sizes(tmp_path, [1, 2, 3, 7, 10])
    splits = find_splits(DataSettings(), data=tmp_path)
    assert np.bincount(splits.validation.labels).tolist() == [0, 1, 1, 1, 2]
    assert np.bincount(splits.train.labels).tolist() == [1, 1, 2, 6, 8]
    assert splits.unlabelled is None
    assert splits.notes == ["1 of 5 training classes have no validation image and are not measured: class0"]


def test_one_image_of_each_class_cannot_be_classified(tmp_path):
    write_sizes(tmp_path, [1] * 10)
    splits = find_splits(DataSettings(), data=tmp_path)
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    assert "each class has one image" in splits.unlabelled
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="only 1 image"):
        find_splits(DataSettings(), data=tmp_path / "single")


def test_classes_without_training_images_are_named(tmp_path):
    write_sizes(tmp_path / "train", [20] * 8)
    write_sizes(tmp_path / "val", [7] * 8)
    splits = find_splits(DataSettings(), data=tmp_path, max_images=6)
    missing = sorted(set(splits.validation.labels.tolist()) - set(splits.train.labels.tolist()))
    assert missing
    assert splits.notes[0].startswith(f"{len(missing)} of ")
    assert "count as wrong: " + ", ".join(f"class{label}" for label in missing) in splits.notes[0]


def write_list(path, folder, separator="\t"):
    images = sorted(folder.glob("*/*.png"))
    path.write_text("".join(f"{image}{separator}{image.parent.name}\n" for image in images))


def test_lists_and_shards_are_split_as_folders_are(tmp_path):
    write_images(tmp_path / "in", 10, seed=0)
    write_list(tmp_path / "all.tsv", tmp_path / "in")
    make_shards(open_images(tmp_path / "in"), tmp_path / "shards", shard_size=20)
    expected = find_splits(DataSettings(), data=tmp_path / "in")
    for name in ("all.tsv", "shards"):
        for arguments in ({"data": tmp_path / name}, {}):
            splits = find_splits(DataSettings(root_path=str(tmp_path), image_folder=name), **arguments)
            assert splits.unlabelled is None
            assert splits.validation.labels.tolist() == expected.validation.labels.tolist()
            assert splits.train.class_names == expected.train.class_names
            assert [splits.validation.read(i) for i in range(6)] == [expected.validation.read(i) for i in range(6)]
    pair = find_splits(DataSettings(), train=tmp_path / "all.tsv", validation=tmp_path / "shards")
    assert (len(pair.train), len(pair.validation)) == (30, 30)


def test_a_list_called_train_has_its_validation_list_beside_it(tmp_path):
    for name, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / "in" / name, count, seed=0)
        write_list(tmp_path / f"{name}.tsv", tmp_path / "in" / name)
    splits = find_splits(DataSettings(root_path=str(tmp_path), image_folder="train.tsv"))
    assert (len(splits.train), len(splits.validation)) == (9, 6)


def test_numbered_classes_that_no_image_has_are_not_missed(tmp_path):
    """Numbers of classes go on to the largest in the list: 0 to 2 in one, 0 to 4 in the other."""
    write_sizes(tmp_path, [2] * 5)
    for name, labels in (("train", (0, 2)), ("val", (0, 2))):
        rows = [f"class{label}/{number:02}.png {label}" for label in labels for number in range(2)]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    splits = find_splits(DataSettings(), data=tmp_path / "train.txt")
    assert splits.validation.labels.tolist() == [0, 0, 2, 2]
    assert splits.notes == []


def test_messages_name_the_keywords_of_python(tmp_path):
    """Those of the command line are in test_report.py."""
    with pytest.raises(DataError, match=r"^give both train and validation, or neither"):
        find_splits(DataSettings(), train=tmp_path)
    with pytest.raises(DataError, match=r"^max_images must be at least 1, not 0"):
        find_splits(DataSettings(), data=tmp_path, max_images=0)
    encoder = VisionTransformer((32, 32), 8, **ARCHITECTURES["vit_nano"])
    torch.save({"target_encoder": encoder.state_dict()}, tmp_path / "weights.pth.tar")
    with pytest.raises(EvaluationError, match="without images: give data a folder"):
        dmtjepa.evaluate(tmp_path / "weights.pth.tar", device="cpu")
