"""What the figures of a run say, in words, and what to do about it.

The thresholds stand here, and those of features in `collapse`, which the report uses as well. They were set by runs
that were made to fail, and by healthy ones; their figures are in `tests/evaluation/histories`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtjepa.config.settings import PatchSettings
from dmtjepa.evaluation.collapse import MAX_COSINE, MIN_RANK
from dmtjepa.evaluation.gains import KEEP_START, compare_with_start, is_measured, judge_gain, measured, same_images

NUM_LOOKS = 3
"""A run has collapsed if so many looks in a row show it."""
GRACE_LOOKS = 10
POSITION_GRACE_LOOKS = 40
"""A run that has never looked healthy has collapsed only after so many looks: in general, and to position alone."""
MIN_VARIANCE = 0.01
MAX_POSITION = 0.5
MAX_BETWEEN = 0.97
MIN_ROWS = 12
"""With fewer rows of figures, nothing is said of learning and of the teacher."""
MIN_EXPLAINED = 0.05
MIN_UPDATE = 1e-6
"""Relative norm of an update below which the student does not move."""
MAX_UPDATE = 0.02
"""Relative norm of an update above which a run that fails makes too large steps. Healthy ones were below 0.012."""
MAX_DECAY = 0.01
"""Share of the weights that weight decay takes in a step, above which a run that fails has too much of it."""
MIN_MOMENTUM = 0.9
MIN_CHANGED = 0.002
"""Share of neighbours that change from look to look, below which the teacher does not move."""
MOMENTA = "0.98 in a run of less than about 3,000 steps, 0.99 up to about 6,000, 0.996 in longer ones"
SCORES = ("eval/linear", "eval/miou", "eval/knn_20")
"""The evaluations during training that tell of over-training."""
MIN_EVALUATIONS = 4
GENTLER_STEPS = (
    "Lower optimization.lr, raise the first value of optimization.ema, lengthen optimization.warmup, or clip the "
    "gradient (optimization.clip_grad)"
)
COLLAPSES = ("collapse", "position", "image_collapse")
"""Names of the findings that say that a run has collapsed."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something that a run shows.

    Args:
        name: `collapse`, `position`, `image_collapse`, `past_collapse`, `image_constant`, `small_steps`, `large_steps`,
            `no_learning`, `slow_teacher`, `fast_teacher`, `over_training`, `worse_than_start`.
        text: what is seen, with figures.
        remedy: what to change.
    """

    name: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}"


def judge(rows: Sequence[Row], patch: PatchSettings) -> list[Finding]:
    """Judge a run by the rows of its `metrics.jsonl`. Empty if nothing is wrong, or too little is known.

    A collapse comes alone: it explains the rest.

    Args:
        patch: of the run. It tells the method, on which it depends what is normal.
    """
    looks = select_looks(rows)
    collapse = find_collapse(looks, patch, rows)
    if collapse is not None:
        return [collapse]
    learning, teacher = find_no_learning(rows), find_teacher(rows)
    if learning is not None and learning.name == "no_learning" and teacher is not None:
        learning = None  # the teacher explains it
    note = None if has_local_targets(patch) else find_image_constant(rows)
    findings = (find_past_collapse(looks, patch), note, learning, teacher, find_over_training(rows))
    return [finding for finding in findings if finding is not None]


def select_looks(rows: Sequence[Row]) -> list[Row]:
    """The rows that hold figures of features."""
    return [row for row in rows if row.get("features/mean_cosine") is not None]


def has_local_targets(patch: PatchSettings) -> bool:
    """Whether targets differ within an image: those of I-JEPA, and those of DMT-JEPA that start from the patch."""
    return not patch.local_agg_head or patch.query == "patch"


def describe(rows: Sequence[Row], patch: PatchSettings) -> list[str]:
    """How much was learnt and what is wrong, as sentences. Empty if nothing was measured."""
    findings = judge(rows, patch)
    sentences = [str(finding) for finding in findings]
    explained = _values(rows, "targets/explained_variance")
    # Constant targets are easy to predict, so the share says nothing of a run that has collapsed.
    if not explained or any(finding.name in COLLAPSES for finding in findings):
        return sentences
    ranks = _values(rows, "features/effective_rank")
    rank = f"; effective rank of the features {ranks[0]:.1f} at first, {ranks[-1]:.1f} at last" if ranks else ""
    if findings:
        start = "The"
    elif len(explained) < MIN_ROWS:
        start = "Too early to judge: the"
    else:
        start = "No sign of a fault: the"
    if explained[-1] < 0:
        learnt = "predictions are further from the targets than a constant would be"
    else:
        learnt = f"predictions explain {explained[-1]:.0%} of the targets' variance"
    return [f"{start} {learnt}{rank}", *sentences]


def describe_end(rows: Sequence[Row], patch: PatchSettings) -> list[str]:
    """What a run says at its end: as `describe`, and how it compares with the weights that it started from."""
    sentences = describe(rows, patch)
    gains = compare_with_start(rows)
    if any(KEEP_START in sentence for sentence in sentences):
        gains = [sentence.removesuffix(f". {KEEP_START}") for sentence in gains]
    return [*sentences, *gains]


# ---- Collapse


def find_collapse(looks: Sequence[Row], patch: PatchSettings, rows: Sequence[Row] = ()) -> Finding | None:
    """Collapse, if each of the last `NUM_LOOKS` looks shows it: of the features, of the targets, to position, or to a
    constant per image.

    The features of a network that was not trained are similar for all images, and depend on position more than on the
    image. So a run that has never looked healthy gets more time.

    Args:
        looks: all rows of a run that hold figures of features.
        patch: of the run.
        rows: others that can tell of steps that were too large.
    """
    recent = looks[-NUM_LOOKS:]
    if len(recent) < NUM_LOOKS or not all(shows_collapse(look, patch) for look in recent):
        return None
    alike, constant = all(map(_is_alike, recent)), all(_is_image_constant(look, patch) for look in recent)
    was_healthy = not all(shows_collapse(look, patch) for look in looks)
    if not was_healthy and len(looks) < (GRACE_LOOKS if alike or constant else POSITION_GRACE_LOOKS):
        return None
    last, (cause, remedy) = looks[-1], _find_large_steps([*looks, *rows]) or ("", "")
    if all(map(_is_positional, recent)):
        return Finding(
            "position",
            f"COLLAPSED to position at step {last['step'] + 1}: {last['targets/variance_of_position']:.0%} of the "
            f"targets' variance depend on the place in the image alone, whatever is in it{cause}",
            remedy
            or "Look at the images that are trained on (are they all alike?), widen data.crop_scale, lower "
            "optimization.lr, or raise the first value of optimization.ema",
        )
    if constant and not alike:
        return Finding(
            "image_collapse",
            f"COLLAPSED to a constant for each image at step {last['step'] + 1}: "
            f"{last['targets/variance_between_images']:.0%} of the targets' variance lie between images, and so "
            f"within an image there is hardly anything to predict{cause}",
            remedy
            or "Lower optimization.lr, raise the first value of optimization.ema, or look at the images that are "
            "trained on: if a crop shows a single texture, raise the first value of data.crop_scale",
        )
    return Finding(
        "collapse",
        f"COLLAPSED at step {last['step'] + 1}: nearly the same for every image (features: mean cosine "
        f"{_show(last, 'features/mean_cosine', 3)}, centred effective rank "
        f"{_show(last, 'features/effective_rank_centered', 1)}; variance of the targets "
        f"{_show(last, 'targets/variance', 4)}){cause}",
        remedy or f"{GENTLER_STEPS}. If that does not help, look at the images: noise ends like this, too",
    )


def find_past_collapse(looks: Sequence[Row], patch: PatchSettings) -> Finding | None:
    """The longest collapse that a run came out of: `NUM_LOOKS` looks or more, after as many healthy ones.

    Features and targets of such a run vary again, which says nothing of what they have kept.
    """
    longest: list[Row] = []
    num_healthy = 0
    for healthy, group in itertools.groupby(looks, lambda look: not shows_collapse(look, patch)):
        same = list(group)
        if healthy:
            num_healthy += len(same)
        elif num_healthy >= NUM_LOOKS and len(same) >= max(NUM_LOOKS, len(longest) + 1):
            longest = same
    if not longest or longest[-1] is looks[-1]:  # the end of the run is that of `find_collapse`
        return None
    return Finding(
        "past_collapse",
        f"COLLAPSED between steps {longest[0]['step'] + 1} and {longest[-1]['step'] + 1}, and left that state again: "
        "what was learnt before is probably lost",
        f"{GENTLER_STEPS}. runtime.on_collapse: rollback goes back to the last healthy checkpoint",
    )


def shows_collapse(look: Row, patch: PatchSettings) -> bool:
    """Whether a single look shows what is a collapse if it stays."""
    return _is_alike(look) or _is_positional(look) or _is_image_constant(look, patch)


def _is_positional(row: Row) -> bool:
    return (row.get("targets/variance_of_position") or 0) > MAX_POSITION


def _is_image_constant(row: Row, patch: PatchSettings) -> bool:
    """Whether targets that should differ within an image are nearly the same there."""
    return has_local_targets(patch) and (row.get("targets/variance_between_images") or 0) > MAX_BETWEEN


def _is_alike(row: Row) -> bool:
    """Whether features or targets are nearly the same for all images."""
    cosine, rank = row.get("features/mean_cosine"), row.get("features/effective_rank_centered")
    variance = row.get("targets/variance")
    return (
        (cosine is not None and cosine > MAX_COSINE)
        or (rank is not None and rank < MIN_RANK)
        or (variance is not None and variance < MIN_VARIANCE)
    )


def find_image_constant(rows: Sequence[Row]) -> Finding | None:
    """Targets that are nearly the same for all patches of an image: the normal state of the published DMT-JEPA.

    Where targets start from the patch, it is a collapse, see `find_collapse`.
    """
    shares = _values(rows, "targets/variance_between_images")[-3:]
    if len(shares) < 3 or np.median(shares) < MAX_BETWEEN:
        return None
    return Finding(
        "image_constant",
        f"{np.median(shares):.0%} of the targets' variance lie between images: within an image, there is hardly "
        "anything to predict. This is normal with the published DMT-JEPA, whose targets start from the image's "
        "mean",
        "It costs detail: patch.query: patch keeps targets local, and patch.local_agg_head: false trains plain I-JEPA",
    )


# ---- Learning


def find_no_learning(rows: Sequence[Row]) -> Finding | None:
    """Weights that do not move, or an explained variance of at most `MIN_EXPLAINED` in the last third of the rows.

    Steps that were too large, at any time, are a cause of their own: a larger learning rate would make it worse.
    """
    explained = _values(rows, "targets/explained_variance")
    if len(explained) < MIN_ROWS:
        return None
    updates = _values(rows, "train/update_norm")
    if updates and np.median(updates) < MIN_UPDATE:
        return Finding(
            "small_steps",
            f"Nothing is learnt: a step changes the weights by {np.median(updates):.1g} of their norm",
            "Raise optimization.lr",
        )
    recent = np.median(explained[-(len(explained) // 3) :])
    if recent > MIN_EXPLAINED:
        return None
    text = f"Nothing is learnt: the predictions explain {recent:.0%} of the targets' variance (a constant explains 0%)"
    if steps := _find_large_steps(rows):
        cause, remedy = steps
        return Finding("large_steps", text + cause, remedy)
    return Finding(
        "no_learning",
        text,
        "Raise optimization.lr or train longer. If that does not help, the hidden patches cannot be told from the "
        "visible ones: hide smaller blocks (mask.pred_mask_scale), let the student see whole contexts (mask.pack), or "
        "look at the images",
    )


def find_teacher(rows: Sequence[Row]) -> Finding | None:
    """A teacher that stands still while the student moves, or that is nearly the student."""
    momenta = _values(rows, "train/momentum")
    if len(momenta) < MIN_ROWS:
        return None
    momentum = float(np.median(momenta))
    if momentum < MIN_MOMENTUM:
        return Finding(
            "fast_teacher",
            f"The teacher follows the student within {1 / (1 - momentum):.1f} steps (momentum {momentum:g}): targets "
            "move with the predictions, which invites a collapse",
            f"Raise the first value of optimization.ema: {MOMENTA}",
        )
    # Momentum rises towards 1, so that the teacher slows down in any run: only the first half tells.
    middle = rows[-1]["step"] / 2
    first = [row for row in rows if row["step"] <= middle]
    changed, updates = _values(first, "neighbors/changed"), _values(first, "train/update_norm")
    if len(changed) < 2 or np.median(changed) > MIN_CHANGED or np.median(updates) < MIN_UPDATE:
        return None
    return Finding(
        "slow_teacher",
        f"The teacher hardly moves: of the neighbours that it chooses, {np.median(changed):.2%} changed from look to "
        f"look (momentum {momentum:g}). The student learns the features of a nearly untrained network",
        f"Lower the first value of optimization.ema: {MOMENTA}",
    )


def find_over_training(rows: Sequence[Row]) -> Finding | None:
    """A score of the evaluations during training that fell after its best while the loss went on falling.

    The last two evaluations are both below the best by more than two standard errors of a difference. If the best are
    the weights that the run started from, whatever the loss does, it makes them worse. Evaluations on other images than
    those of the last one say nothing: settings may change when a run resumes.
    """
    for name in SCORES:
        evaluations = [row for row in rows if is_measured(row, name)]
        evaluations = [row for row in evaluations if same_images(row, evaluations[-1])]
        if len(evaluations) < MIN_EVALUATIONS:
            continue
        scores = [row[name] for row in evaluations]
        best = int(np.argmax(scores))
        top, recent = measured(evaluations[best], name), max(measured(row, name) for row in evaluations[-2:])
        if best >= len(scores) - 2 or judge_gain(recent, top) != "worse":
            continue
        if evaluations[best]["step"] < 0:
            return Finding(
                "worse_than_start",
                f"Worse than its start: {name} of the weights that the run started from was {scores[best]:.1%} and is "
                f"{scores[-1]:.1%} now",
                KEEP_START,
            )
        then, now = (_loss_before(rows, evaluations[place]["step"]) for place in (best, -1))
        if then is not None and now is not None and now < then:
            return Finding(
                "over_training",
                f"Over-trained: {name} was {scores[best]:.1%} at step {evaluations[best]['step'] + 1} and is "
                f"{scores[-1]:.1%} now, although the loss went on falling ({then:.4f} then, {now:.4f} now)",
                "Stop here and take the best evaluation (evaluation.keep_best), or shorten the run "
                "(optimization.epochs), whose schedules then end earlier",
            )
    return None


def _loss_before(rows: Sequence[Row], step: int) -> float | None:
    """Mean of the losses that were logged last until a step."""
    losses = _values([row for row in rows if row["step"] <= step], "train/loss")[-5:]
    return float(np.mean(losses)) if losses else None


def _find_large_steps(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Half a sentence on steps that were too large, if there was one, and the remedy."""
    decay = max(((row.get("train/lr") or 0) * (row.get("train/weight_decay") or 0) for row in rows), default=0)
    update = max(_values(rows, "train/update_norm"), default=0)
    if decay > MAX_DECAY:
        return (
            f"; weight decay took up to {decay:.0%} of the weights in a step",
            "Lower optimization.weight_decay and optimization.final_weight_decay",
        )
    if update > MAX_UPDATE:
        return (
            f"; a step changed the weights by up to {update:.0%} of their norm",
            "Lower optimization.lr, lengthen optimization.warmup, or clip the gradient (optimization.clip_grad)",
        )
    return None


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _show(row: Row, name: str, digits: int) -> str:
    value = row.get(name)
    return "not known" if value is None else f"{value:.{digits}f}"
