import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dmtjepa.data import open_images
from dmtjepa.data.sources.shapes import ShapesParameters, find_shapes
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.segmentation import (
    VOID,
    bootstrap_error,
    count_pixels,
    find_mask,
    find_masked,
    label_patches,
    mean_iou,
    read_mask,
    read_masks,
    segment,
)


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
    scores = segment(train_patches, train_masks, patches, masks, (4, 4)).scores
    assert scores.mean_iou == pytest.approx(1)
    assert scores.object_iou == pytest.approx(1)


def test_features_without_the_class_find_the_object_only():
    train_masks, masks = make_masks(60, 0), make_masks(40, 1)
    train_patches, patches = ((label_patches(m, (4, 4), 4) > 0).float()[..., None] for m in (train_masks, masks))
    scores = segment(train_patches, train_masks, patches, masks, (4, 4)).scores
    assert scores.object_iou == pytest.approx(1)
    assert scores.mean_iou < 0.6


def test_patches_take_their_most_frequent_class():
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, :2, :2] = torch.tensor([[2, 2], [2, 0]])
    mask[0, 2:, 2:] = torch.tensor([[1, 0], [0, 0]])
    assert label_patches(mask, (2, 2), 3).tolist() == [[2, 0, 0, 0]]


@pytest.mark.slow
def test_masks_of_the_drawn_set_are_found_and_cut_as_images(tmp_path):
    folder = find_shapes(ShapesParameters(num_train=10, num_val=10, image_size=64), cache=tmp_path)
    image = next(folder.glob("val/star/*.jpg"))
    mask = find_mask(image)
    assert mask == folder / "masks" / "val" / "star" / f"{image.stem}.png"
    cut = read_mask(mask, (56, 56))
    assert cut.shape == (56, 56)
    whole = torch.from_numpy(np.array(Image.open(mask)))
    # 64 pixels are resized to 64 and the central 56 cut out.
    assert torch.equal(cut, whole[4:60, 4:60])
    label = sorted(entry.name for entry in (folder / "val").iterdir()).index("star")
    assert set(cut.unique().tolist()) <= {0, 1 + label}


def test_images_without_a_mask_have_none(tmp_path):
    assert find_mask(tmp_path / "train" / "dog" / "1.jpg") is None
    assert find_mask(Path("1.jpg")) is None


@pytest.mark.parametrize("image", ["val/1.jpg", "val/cat/1.jpg", "val/cat/near/1.jpg", "val/a.b.jpg"])
def test_masks_lie_beside_the_splits_with_or_without_class_folders(tmp_path, image):
    mask = (tmp_path / "masks" / image).with_suffix(".png")
    mask.parent.mkdir(parents=True)
    Image.new("L", (4, 4)).save(mask)
    assert find_mask(tmp_path / image) == mask
    assert find_mask(tmp_path / "train" / "1.jpg") is None


def test_void_pixels_are_no_class():
    """As in VOC: a border of 255 around objects changes no score."""
    train_masks, masks = make_masks(40, 0), make_masks(20, 1)
    train_patches, patches = (F.one_hot(label_patches(m, (4, 4), 4), 4).float() for m in (train_masks, masks))
    train_masks[:, :, :2], masks[:, :, :2] = VOID, VOID
    scores = segment(train_patches, train_masks, patches, masks, (4, 4)).scores
    assert scores.mean_iou == pytest.approx(1)
    assert scores.object_iou == pytest.approx(1)
    train_masks[:, :8], masks[:, :8] = VOID, VOID  # half of the patches have no class at all
    assert segment(train_patches, train_masks, patches, masks, (4, 4)).scores.mean_iou == pytest.approx(1)


def test_patches_without_a_known_pixel_are_void():
    mask = torch.full((1, 4, 4), VOID)
    mask[0, 0, 0] = 2
    assert label_patches(mask, (2, 2), 3).tolist() == [[2, VOID, VOID, VOID]]


def test_pixels_are_counted_by_class_and_prediction():
    masks = torch.tensor([[[0, 1, 2, 2], [0, 1, VOID, 2]]])
    assert count_pixels(torch.tensor([[[1, 2]]]), masks, 3).tolist() == [[0, 2, 0], [0, 2, 0], [0, 0, 3]]


def test_masks_of_one_class_cannot_be_scored():
    patches, masks = torch.randn(4, 16, 3), torch.zeros(4, 16, 16, dtype=torch.uint8)
    with_void = masks.clone()
    with_void[:, :4] = VOID
    for some in (masks, with_void):
        with pytest.raises(EvaluationError, match="no class but 0"):
            segment(patches, some, patches, some, (4, 4))
    with pytest.raises(EvaluationError, match="void"):
        segment(patches, masks + VOID, patches, masks + VOID, (4, 4))
    with pytest.raises(EvaluationError, match="1 training patches"):
        segment(patches[:1, :1], masks[:1] + 1, patches, masks, (1, 1))


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of values of any tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_classes():
    masks = torch.randint(0, 200, (30, 32, 32), dtype=torch.uint8)
    with LargestTensor() as largest:
        labels = label_patches(masks, (4, 4), 200)
        count_pixels(labels.view(30, 4, 4), masks, 200)
    assert largest.size <= 2 * max(masks.numel(), 200 * 200)


def test_masks_of_every_bit_depth_hold_class_numbers(tmp_path):
    one_bit = Image.new("1", (4, 4))
    one_bit.putpixel((1, 0), 1)
    one_bit.save(tmp_path / "1.png")
    assert read_mask(tmp_path / "1.png", (4, 4)).unique().tolist() == [0, 1]
    palette = Image.fromarray(np.full((4, 4), 3, np.uint8)).convert("P")
    palette.save(tmp_path / "4.png", bits=4)
    assert read_mask(tmp_path / "4.png", (4, 4)).unique().tolist() == [3]
    grey = Image.fromarray(np.full((4, 4), 7, np.int32))
    grey.save(tmp_path / "32.tif")
    assert read_mask(tmp_path / "32.tif", (4, 4)).unique().tolist() == [7]


def test_grey_of_four_bits_is_not_scaled(tmp_path):
    """Pillow cannot write such a file, and scales its values to 0...255 when it reads one."""
    rows = b"".join(b"\x00" + bytes([0x3F, 0x00]) for _ in range(4))  # classes 3, 15, 0, 0
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path = tmp_path / "grey.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    assert read_mask(path, (4, 4))[0].tolist() == [3, 15, 0, 0]


def test_masks_that_hold_no_class_numbers_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "color.png")
    with pytest.raises(EvaluationError, match=r"color\.png holds colours"):
        read_mask(tmp_path / "color.png", (4, 4))
    Image.fromarray(np.full((4, 4), 300, np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(EvaluationError, match="holds 300"):
        read_mask(tmp_path / "large.tif", (4, 4))


def test_mean_iou_and_its_error_equal_a_direct_computation():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (40, 8, 8))
    predicted = np.where(rng.random((40, 8, 8)) < 0.7, masks, rng.integers(0, 3, (40, 8, 8)))
    masks[:, 0] = VOID

    def score(images):
        truth, guess = masks[images], predicted[images]
        known = truth != VOID
        ious = []
        for label in range(5):  # 3 and 4 are nowhere
            both = np.sum((truth == label) & (guess == label) & known)
            either = np.sum(((truth == label) | (guess == label)) & known)
            ious += [both / either] if either else []
        return np.mean(ious)

    counts = torch.stack(
        [
            count_pixels(torch.from_numpy(guess)[None], torch.from_numpy(mask)[None], 5)
            for guess, mask in zip(predicted, masks, strict=True)
        ]
    )
    assert mean_iou(counts.sum(0)[None]).item() == pytest.approx(score(np.arange(40)))
    resampled = np.std([score(rng.integers(0, 40, 40)) for _ in range(400)])
    assert bootstrap_error(counts) == pytest.approx(resampled, rel=0.25)


def test_a_few_masks_among_many_images_are_all_found(tmp_path):
    """Not those of a sample of the images, most of which have none."""
    for folder in ("train", "masks/train"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(2000):
        (tmp_path / f"train/{number:04d}.jpg").touch()
    assert len(find_masked(open_images(tmp_path / "train"))) == 0
    for number in range(100, 140):
        (tmp_path / f"masks/train/{number:04d}.png").touch()
    masked = find_masked(open_images(tmp_path / "train"))
    assert [Path(masked.name(image)).stem for image in range(len(masked))] == [f"{n:04d}" for n in range(100, 140)]
    for number in range(2000):
        (tmp_path / f"masks/train/{number:04d}.png").touch()
    masked = find_masked(open_images(tmp_path / "train"))
    assert len({masked.name(image) for image in range(len(masked))}) == 300


@pytest.mark.parametrize(
    ("image_size", "orientation", "mask_size", "fits"),
    [
        ((80, 40), 1, (80, 40), True),
        ((80, 40), 1, (40, 40), False),
        ((80, 40), 6, (80, 40), False),
        ((80, 40), 6, (40, 80), True),
        ((641, 481), 1, (320, 240), True),
        ((40, 30), 1, (400, 300), True),
        ((80, 40), 1, (75, 40), False),
    ],
)
def test_masks_of_another_shape_than_their_images_are_refused(tmp_path, image_size, orientation, mask_size, fits):
    """They would be cropped elsewhere. Images are turned as their EXIF orientation says, and PNG masks are not."""
    (tmp_path / "masks/train").mkdir(parents=True)
    (tmp_path / "train").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", image_size).save(tmp_path / "train/1.jpg", exif=exif)
    Image.new("L", mask_size).save(tmp_path / "masks/train/1.png")
    if fits:
        assert read_masks([str(tmp_path / "train/1.jpg")], (8, 8)).shape == (1, 8, 8)
    else:
        with pytest.raises(EvaluationError, match=r"1.png has .* in the shape of the upright image"):
            read_masks([str(tmp_path / "train/1.jpg")], (8, 8))
