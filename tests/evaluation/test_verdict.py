"""The verdict names what is wrong with runs that were made to fail, and is silent on healthy ones.

`histories` holds the figures of real runs of small networks (width 64 to 128) on CIFAR-10, photographs of scenes,
street scenes, grey images and noise; `tests/helpers/record_histories.py` makes them. The first part of a file's name
is what the run shows.
"""

from pathlib import Path

import pytest

from dmtjepa.config.settings import PatchSettings
from dmtjepa.evaluation.gains import KEEP_START
from dmtjepa.evaluation.verdict import (
    GRACE_LOOKS,
    MIN_ROWS,
    NUM_LOOKS,
    describe,
    describe_end,
    find_collapse,
    judge,
)
from dmtjepa.metrics_file import read_metrics

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.jsonl"))
IJEPA = PatchSettings(local_agg_head=False)
METHODS = {
    "healthy_dmt": PatchSettings(),
    "healthy-query_patch": PatchSettings(query="patch"),
    "past_collapse-street": PatchSettings(),
}
"""Of the histories that are not of I-JEPA, by the beginning of their names."""
ALLOWED = {
    "healthy": set(),
    "healthy_dmt": {"image_constant"},  # the normal state of the published method; a note
}
CAUSES_BESIDES = {"fast_teacher-lr10x": {"large_steps"}}
REMEDIES = {
    "collapse-lr100x": "of their norm. Lower optimization.lr",
    "collapse-noise": "look at the images",
    "collapse-zeros": "Lower optimization.lr",
    "image_collapse-mean": "raise the first value of optimization.ema",
    "fast_teacher-ema0": "Raise the first value of optimization.ema",
    "fast_teacher-lr10x": "Lower optimization.lr",
    "no_learning-lr_small": "Raise optimization.lr",
    "over_training-64_images": "take the best evaluation (evaluation.keep_best)",
    "past_collapse-street": "raise the first value of optimization.ema",
    "position-decay": "Lower optimization.weight_decay",
    "position-grey": "Look at the images",
    "slow_teacher-momentum1": "Lower the first value of optimization.ema",
    "small_steps-lr0": "Raise optimization.lr",
}


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_is_judged_as_what_it_is(path):
    rows, kind = read_metrics(path), path.stem.partition("-")[0]
    patch = next((patch for name, patch in METHODS.items() if path.stem.startswith(name)), IJEPA)
    found = [{finding.name for finding in judge(rows[:end], patch)} for end in range(1, len(rows) + 1)]
    if kind in ALLOWED:
        assert set().union(*found) <= ALLOWED[kind]  # at no time
    else:
        assert found[-1] == {kind} | CAUSES_BESIDES.get(path.stem, set())
        assert REMEDIES[path.stem] in " ".join(describe(rows, patch))


@pytest.mark.parametrize("query", ["image", "targets", "patch"])
def test_targets_that_are_constant_in_an_image_are_normal_only_for_the_published_method(query):
    """The note advises what a run that has local targets already uses."""
    rows = read_metrics(HISTORIES[0].with_name("image_collapse-mean.jsonl"))
    found = [judge(rows, patch)[0].name for patch in (PatchSettings(query=query), IJEPA)]
    assert found == ["image_collapse" if query == "patch" else "image_constant", "image_collapse"]
    assert "patch.query" not in " ".join(describe(rows, IJEPA))


def look(step, cosine=0.5, rank=20.0, variance=0.5, position=0.0, between=0.5):
    return {
        "step": step,
        "features/mean_cosine": cosine,
        "features/effective_rank_centered": rank,
        "targets/variance": variance,
        "targets/variance_of_position": position,
        "targets/variance_between_images": between,
    }


@pytest.mark.parametrize(
    ("alike", "name"),
    [
        ({"cosine": 0.999}, "collapse"), ({"rank": 1.5}, "collapse"), ({"variance": 1e-4}, "collapse"),
        ({"position": 0.9}, "position"), ({"between": 0.99}, "image_collapse"),
    ],
    ids=str,
)  # fmt: skip
def test_a_collapse_has_to_stay(alike, name):
    healthy = [look(step) for step in range(5)]
    for count in range(1, NUM_LOOKS + 2):
        found = find_collapse(healthy + [look(5 + step, **alike) for step in range(count)], IJEPA)
        assert (found.name if found else None) == (name if count >= NUM_LOOKS else None)
    assert find_collapse(healthy + [look(5, **alike)] * NUM_LOOKS + healthy[:1], IJEPA) is None


def test_a_collapse_that_a_run_came_out_of_is_not_forgotten():
    """The longest is told, once the run is healthy again; an untrained network that was not yet healthy has none."""
    healthy, alike = [look(step) for step in range(NUM_LOOKS)], [look(10 + step, variance=1e-4) for step in range(5)]
    (finding,) = judge([*healthy, *alike, look(20)], IJEPA)
    assert finding.name == "past_collapse"
    assert "between steps 11 and 15" in finding.text
    (finding,) = judge(
        [*healthy, *alike, look(20), *[look(30 + step, position=0.9) for step in range(3)], look(40)], IJEPA
    )
    assert "between steps 11 and 15" in finding.text
    assert judge([*healthy, *alike[: NUM_LOOKS - 1], look(20)], IJEPA) == []
    assert judge([*alike, look(20)], IJEPA) == []
    assert judge([*healthy[1:], *alike, look(20)], IJEPA) == []  # an untrained network may waver
    assert [found.name for found in judge([*healthy, *alike], IJEPA)] == ["collapse"]


def test_an_untrained_network_has_time_to_tell_images_apart():
    alike = [look(step, cosine=0.999) for step in range(GRACE_LOOKS)]
    assert find_collapse(alike[:-1], IJEPA) is None
    assert find_collapse(alike, IJEPA).name == "collapse"


def evaluations(scores, losses):
    rows = []
    for epoch, (score, loss) in enumerate(zip(scores, losses, strict=True)):
        rows += [{"step": 100 * epoch + step, "train/loss": loss} for step in range(10)]
        rows.append({"step": 100 * epoch + 50, "eval/linear": score, "eval/images": 2000})
    return rows


@pytest.mark.parametrize(
    ("scores", "losses", "found"),
    [
        ((0.4, 0.5, 0.6, 0.55, 0.5), (5, 4, 3, 2, 1), True),
        ((0.4, 0.5, 0.6, 0.55, 0.5), (1, 2, 3, 4, 5), False),  # the loss rose, too
        ((0.4, 0.5, 0.6, 0.59, 0.59), (5, 4, 3, 2, 1), False),  # within two standard errors
        ((0.4, 0.5, 0.6, 0.5, 0.6), (5, 4, 3, 2, 1), False),  # it came back
        ((0.6, 0.5, 0.4), (3, 2, 1), False),  # too few
    ],
)
def test_over_training_is_a_score_that_falls_while_the_loss_does(scores, losses, found):
    findings = judge(evaluations(scores, losses), IJEPA)
    assert [finding.name for finding in findings] == ["over_training"] * found
    if found:
        assert "60.0% at step 251" in findings[0].text
        assert "keep_best" in findings[0].remedy


def test_evaluations_on_other_images_do_not_tell_of_over_training():
    """`evaluation.data` and `evaluation.max_images` may change when a run resumes."""
    rows = evaluations((0.5, 0.6, 0.5, 0.4), (4, 3, 2, 1))
    measured = [row for row in rows if "eval/linear" in row]
    for change in ({"eval/images": 300}, {"eval/images_digest": "other"}):
        changed = {"eval/images_digest": "first"} | change
        mixed = [row | changed if row in measured[2:] else row | {"eval/images_digest": "first"} for row in rows]
        assert judge(mixed, IJEPA) == []
    earlier_version = [row | {"eval/images_digest": "first"} if row in measured[2:] else row for row in rows]
    assert [finding.name for finding in judge(earlier_version, IJEPA)] == ["over_training"]


@pytest.mark.parametrize(("error", "found"), [(0.01, True), (0.05, False)])
def test_over_training_of_a_mean_iou_is_judged_by_its_own_error(error, found):
    rows = [
        {"step": row["step"], "eval/miou": row["eval/linear"], "eval/miou_error": error}
        if "eval/linear" in row
        else row
        for row in evaluations((0.3, 0.36, 0.3, 0.3), (4, 3, 2, 1))
    ]
    assert bool(judge(rows, IJEPA)) == found


def test_a_run_that_never_reaches_its_start_is_told_so():
    start = {"step": -1, "eval/linear": 0.6, "eval/images": 2000}
    assert judge([start, *evaluations((0.5, 0.5), (1, 2))], IJEPA) == []  # too few
    (finding,) = judge([start, *evaluations((0.4, 0.5, 0.5), (1, 2, 3))], IJEPA)
    assert finding.name == "worse_than_start"
    assert "eval/linear of the weights that the run started from was 60.0% and is 50.0% now" in finding.text
    assert judge([start, *evaluations((0.4, 0.5, 0.59), (1, 2, 3))], IJEPA) == []


def test_the_end_of_a_run_that_is_worse_than_its_start_says_once_what_to_do():
    measured = {"eval/seconds": 1.0, "eval/images": 2000, "eval/train_images": 100}
    rows = [
        row | measured if "eval/linear" in row else row
        for row in [{"step": -1, "eval/linear": 0.6}, *evaluations((0.4, 0.5, 0.5), (1, 2, 3))]
    ]
    finding, gain = describe_end(rows, IJEPA)
    assert finding.startswith("Worse than its start")
    assert finding.endswith(KEEP_START)
    assert gain.endswith("linear probe -10.0 +- 1.6 points (worse)")
    (alone,) = describe_end([rows[0], rows[-1]], IJEPA)  # too few for a verdict
    assert alone.endswith(f"(worse). {KEEP_START}")


def test_nothing_measured_nothing_said():
    assert judge([], IJEPA) == describe([], IJEPA) == []
    assert describe([{"step": 9, "train/loss": 0.5}], IJEPA) == []


def test_a_healthy_run_is_told_so():
    rows = [
        look(step) | {"targets/explained_variance": 0.4, "features/effective_rank": 10.0 + step} for step in range(20)
    ]
    (sentence,) = describe(rows, IJEPA)
    assert sentence.startswith("No sign of a fault: the predictions explain 40%")
    assert "10.0 at first, 29.0 at last" in sentence


def test_a_few_figures_are_too_early_to_judge():
    rows = [look(step) | {"targets/explained_variance": -1.26} for step in range(MIN_ROWS)]
    (early,) = describe(rows[:-1], IJEPA)
    assert early == "Too early to judge: the predictions are further from the targets than a constant would be"
    late = " ".join(describe(rows, IJEPA))
    assert "Nothing is learnt" in late
    assert "Too early" not in late


def test_what_was_explained_is_said_beside_a_finding_but_not_after_a_collapse():
    rows = [
        look(step) | {"targets/explained_variance": 0.9, "targets/variance_between_images": 0.99} for step in range(20)
    ]
    explained, finding = describe(rows, PatchSettings())
    assert explained.startswith("The predictions explain 90%")
    assert "99% of the targets' variance lie between images" in finding
    (sentence,) = describe([row | {"features/mean_cosine": 1.0} for row in rows], PatchSettings())
    assert sentence.startswith("COLLAPSED")
