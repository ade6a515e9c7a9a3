"""Better and worse than the weights that a run started from, at the end of its log."""

import pytest

from dmtjepa.evaluation.gains import KEEP_START, compare_with_start

START = {
    "step": -1,
    "eval/seconds": 1.0,
    "eval/images": 100,
    "eval/train_images": 400,
    "eval/linear": 0.5,
    "eval/knn_20": 0.6,
    "eval/miou": 0.6,
    "eval/miou_error": 0.03,
}
END = START | {"step": 9}


def test_two_evaluations_tell_better_from_worse_beyond_two_standard_errors():
    rows = [START, {"step": 8, "train/loss": 0.1}, END | {"eval/linear": 0.8, "eval/miou": 0.55}]
    assert compare_with_start(rows) == [
        "Against the weights that the run started from: linear probe +30.0 +- 6.4 points (better), "
        "k-NN +0.0 +- 6.9 points (not clearly different), mIoU -5.0 +- 4.2 points (not clearly different)"
    ]
    (sentence,) = compare_with_start([START, END | {"eval/miou": 0.5}])
    assert sentence.endswith(f"mIoU -10.0 +- 4.2 points (worse). {KEEP_START}")


def test_a_mean_iou_without_its_error_is_left_out():
    """Earlier versions did not record it, and it cannot be told from the number of images."""
    before = {name: value for name, value in START.items() if name != "eval/miou_error"}
    (sentence,) = compare_with_start([before, END])
    assert "linear probe" in sentence
    assert "mIoU" not in sentence


@pytest.mark.parametrize(
    "rows",
    [
        [START],
        [START | {"step": 4}, END],  # the run did not start from weights
        [START, END | {"eval/images": 90}],
        [START | {"eval/images_digest": "first"}, END | {"eval/images_digest": "other"}],
        [{"step": -1, "eval/seconds": 1.0}, END],
        [START, {"step": 9, "train/loss": 0.1}],
    ],
)
def test_what_cannot_be_compared_is_not(rows):
    assert compare_with_start(rows) == []
