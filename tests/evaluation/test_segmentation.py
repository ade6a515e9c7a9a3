from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmtjepa.data.sources.shapes import ShapesParameters, find_shapes
from dmtjepa.evaluation.segmentation import find_mask, label_patches, read_mask, score_segmentation


def make_masks(n, seed):
    """Squares of 3 classes aligned to the patches of 4 pixels of 16x16 images."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(n, 16, 16, dtype=torch.int64)
    for mask in masks:
        row, column = rng.integers(0, 3, 2) * 4
        mask[row : row + 8, column : column + 8] = int(rng.integers(1, 4))
    return masks


def test_perfect_features_give_perfect_scores():
    train_masks, masks = make_masks(40, 0), make_masks(20, 1)
    train_patches, patches = (F.one_hot(label_patches(m, (4, 4), 4), 4).float() for m in (train_masks, masks))
    scores = score_segmentation(train_patches, train_masks, patches, masks, (4, 4))
    assert scores.mean_iou == pytest.approx(1)
    assert scores.object_iou == pytest.approx(1)


def test_features_without_the_class_find_the_object_only():
    train_masks, masks = make_masks(60, 0), make_masks(40, 1)
    train_patches, patches = ((label_patches(m, (4, 4), 4) > 0).float()[..., None] for m in (train_masks, masks))
    scores = score_segmentation(train_patches, train_masks, patches, masks, (4, 4))
    assert scores.object_iou == pytest.approx(1)
    assert scores.mean_iou < 0.6


def test_patches_take_their_most_frequent_class():
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, :2, :2] = torch.tensor([[2, 2], [2, 0]])
    mask[0, 2:, 2:] = torch.tensor([[1, 0], [0, 0]])
    assert label_patches(mask, (2, 2), 3).tolist() == [[2, 0, 0, 0]]


def test_masks_of_the_drawn_set_are_found_and_cut_as_images(tmp_path):
    folder = find_shapes(ShapesParameters(num_train=10, num_val=10, image_size=64), cache=tmp_path)
    image = next(folder.glob("val/star/*.jpg"))
    mask = find_mask(image)
    assert mask == folder / "masks" / "val" / "star" / f"{image.stem}.png"
    cut = read_mask(mask, (56, 56))
    assert cut.shape == (56, 56)
    whole = torch.from_numpy(np.array(Image.open(mask)).astype(np.int64))
    # 64 pixels are resized to 64 and the central 56 cut out.
    assert torch.equal(cut, whole[4:60, 4:60])
    label = sorted(entry.name for entry in (folder / "val").iterdir()).index("star")
    assert set(cut.unique().tolist()) <= {0, 1 + label}


def test_images_without_a_mask_have_none(tmp_path):
    assert find_mask(tmp_path / "train" / "dog" / "1.jpg") is None
    assert find_mask(Path("1.jpg")) is None
