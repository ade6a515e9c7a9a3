"""Evaluation during training: it changes nothing, it is made up for after a kill, and the best encoders are kept."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmtjepa import checkpoint_format
from dmtjepa.config import ConfigError, change_settings
from dmtjepa.data import DataError, build_eval_loader
from dmtjepa.evaluation.context import load_teacher
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.evaluator import open_asked_splits
from dmtjepa.evaluation.features import extract_features
from dmtjepa.evaluation.knn import knn_accuracy, standardize
from dmtjepa.evaluation.linear import fit_linear
from dmtjepa.interop import read_checkpoint
from dmtjepa.metrics_file import read_metrics
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.check import check_dry_run, check_start
from dmtjepa.training.evaluation import PeriodicEvaluation
from dmtjepa.training.launch import launch
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.step import TrainStep


@pytest.fixture(scope="package")
def evaluated(settings_in, labelled, tmp_path_factory, plain):
    """The run `plain`, evaluated after each of its 3 epochs."""
    config = settings_in(tmp_path_factory.mktemp("evaluated"), **every_epoch(labelled))
    assert launch(config, ["cpu"]) == 0
    return config


def every_epoch(labelled):
    return {"evaluation.every_epochs": 1, "evaluation.data": str(labelled), "evaluation.keep_best": True}


def read_rows(config):
    rows = read_metrics(RunFolder.from_config(config).metrics_file)
    return [row for row in rows if "eval/seconds" in row]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "eval/seconds"} for row in rows]


@pytest.mark.slow
def test_training_is_the_same_bit_by_bit(plain, evaluated, losses, weights):
    assert losses(evaluated) == losses(plain)
    torch.testing.assert_close(weights(evaluated), weights(plain), rtol=0, atol=0)
    states = [
        checkpoint_format.load_full(checkpoint_format.newest_whole(Path(config.logging.folder, "checkpoints")))
        for config in (evaluated, plain)
    ]
    assert torch.equal(states[0]["rng.0"], states[1]["rng.0"])


@pytest.mark.slow
def test_the_rows_are_what_the_report_measures(evaluated, labelled):
    rows = read_rows(evaluated)
    assert [row["step"] for row in rows] == [7, 15, 23]
    last = rows[-1]
    # The tiny network has two blocks.
    for name in ("linear", "knn_10", "knn_20_layout", "miou"):
        assert {f"eval/{prefix}{name}" for prefix in ("", "block1/", "student/", "student/block1/")} <= last.keys()
    assert {"eval/linear_layout", "eval/student/linear_layout"} <= last.keys()
    assert "eval/knn_100" not in last  # there are 30 training images
    assert (last["eval/train_images"], last["eval/images"]) == (30, 12)
    assert last["eval/seconds"] > 0

    teacher, _ = load_teacher(evaluated, RunFolder.from_config(evaluated).latest_export)
    train, validation = (
        extract_features(teacher, build_eval_loader(labelled / split, 32, 256), grid_size=(8, 8), progress=False)
        for split in ("train", "val")
    )
    probe = fit_linear(train.pooled, train.labels)
    assert last["eval/linear"] == pytest.approx(probe.accuracy(validation.pooled, validation.labels))
    gallery, queries = standardize(train.layout, validation.layout)
    expected = knn_accuracy(gallery, train.labels, queries, validation.labels, num_neighbors=(20,))[20]
    assert last["eval/knn_20_layout"] == pytest.approx(expected)


@pytest.mark.slow
def test_tensorboard_has_pictures_of_each_evaluation(evaluated):
    board = EventAccumulator(str(RunFolder.from_config(evaluated).tensorboard)).Reload()
    steps = {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}
    each = [7, 15, 23]  # but masks are the same each time
    names = "figures/masks", "figures/neighbors", "figures/pca", "figures/nearest"
    assert steps == dict(zip(names, ([7], each, each, each), strict=True))
    first, *_, last = board.Images("figures/pca")
    assert first.encoded_image_string != last.encoded_image_string
    with Image.open(io.BytesIO(last.encoded_image_string)) as picture:
        picture.load()
        assert picture.size == (last.width, last.height)
        assert picture.width > picture.height > 100


@pytest.mark.slow
def test_the_best_encoders_are_kept(evaluated):
    rows = read_rows(evaluated)
    best = max(rows, key=lambda row: row["eval/linear"])  # the first of equals
    kept = read_checkpoint(RunFolder.from_config(evaluated).best_export)
    assert kept["step"] == best["step"] + 1
    assert {"encoder", "target_encoder"} <= kept.keys()
    load_teacher(evaluated, RunFolder.from_config(evaluated).best_export)


@pytest.mark.slow
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(evaluated, labelled, settings, monkeypatch, losses):
    config = settings(**every_epoch(labelled))
    run = PeriodicEvaluation.run

    def killed(evaluation):
        if evaluation._state.step == 16:
            raise KeyboardInterrupt
        run(evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(PeriodicEvaluation, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, ["cpu"])
    assert [row["step"] for row in read_rows(config)] == [7]
    folder = RunFolder.from_config(config)
    resumed = checkpoint_format.step_of(checkpoint_format.newest_whole(folder.checkpoints))
    assert resumed in (8, 16)  # whether the checkpoint was complete
    assert launch(config, ["cpu"]) == 0
    assert without_seconds(read_rows(config)) == without_seconds(read_rows(evaluated))
    assert losses(config) == losses(evaluated)
    kept = [read_checkpoint(RunFolder.from_config(c).best_export) for c in (config, evaluated)]
    torch.testing.assert_close(kept[0]["target_encoder"], kept[1]["target_encoder"], rtol=0, atol=0)


@pytest.mark.slow
def test_weights_that_a_run_starts_from_are_measured_before_its_first_step(evaluated, labelled, settings, monkeypatch):
    given = RunFolder.from_config(evaluated).latest_export
    changes = {"optimization.epochs": 1, "optimization.warmup": 0}
    changes |= {"meta.load_checkpoint": True, "meta.read_checkpoint": str(given)}
    config = settings(**every_epoch(labelled) | changes)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, ["cpu"])
    first = read_rows(config)
    assert without_seconds(first) == [without_seconds(read_rows(evaluated))[-1] | {"step": -1}]
    assert read_checkpoint(RunFolder.from_config(config).best_export)["step"] == 0

    assert launch(config, ["cpu"]) == 0
    rows = read_rows(config)
    assert rows[:1] == first  # and not measured again
    assert [row["step"] for row in rows] == [-1, 7]
    board = EventAccumulator(str(RunFolder.from_config(config).tensorboard)).Reload()
    assert [event.step for event in board.Scalars("eval/linear")] == [-1, 7]


@pytest.mark.slow
def test_start_and_end_are_measured_without_being_asked(plain, evaluated, labelled, settings, caplog, capfd):
    changes = {"optimization.epochs": 2, "optimization.warmup": 0, "evaluation.data": str(labelled)}
    changes |= {"meta.load_checkpoint": True, "meta.read_checkpoint": plain.logging.folder}
    config = settings(**changes)
    with caplog.at_level(logging.INFO):
        assert launch(config, ["cpu"]) == 0
    first, last = read_rows(config)
    assert without_seconds([first]) == [without_seconds(read_rows(evaluated))[-1] | {"step": -1}]
    assert last["step"] == 15
    assert "measured on 30 and 12 images (evaluation.measure_start=false: not)" in caplog.text
    assert re.search(r"evaluation before the first step \(\d+\.\d s\): k-NN", caplog.text)
    verdict = capfd.readouterr().err.partition("Against the weights that the run started from: ")[2]
    assert re.match(r"linear probe \S+ \+- \S+ points \(.*, k-NN \S+ \+- .*, mIoU \S+ \+- \S+ points \(", verdict)

    off = change_settings(config, {"evaluation.measure_start": False})
    assert open_asked_splits(off) is None
    assert not off.measures_start


def test_images_without_labels_do_not_keep_a_run_from_starting_from_weights(settings):
    faults = []
    config = settings(**{"meta.load_checkpoint": True, "meta.read_checkpoint": "given.pth.tar"})
    assert open_asked_splits(config, faults.append) is None
    assert "Set evaluation.data to images with labels or masks, or evaluation.measure_start: false" in faults[0]
    for data in ("$NOT_SET/images", "no/such/folder"):
        assert open_asked_splits(change_settings(config, {"evaluation.data": data}), faults.append) is None
    assert ["NOT_SET" in fault for fault in faults] == [False, True, False]
    assert "evaluation.data: no/such/folder does not exist" in faults[2]
    assert open_asked_splits(settings(), faults.append) is None  # there are no weights to measure
    assert len(faults) == 3


@pytest.mark.slow
def test_a_dry_run_says_what_a_start_from_weights_would_measure(plain, labelled, settings, tmp_path, caplog):
    data = Path(shutil.copytree(labelled, tmp_path / "images"))
    weights = {"meta.load_checkpoint": True, "meta.read_checkpoint": plain.logging.folder}
    config = settings(**weights | {"evaluation.data": str(data)})

    def messages(config):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            check_dry_run(config, 1, ["cpu"])
        return caplog.text

    assert "measured on 30 and 12 images" in messages(config)
    unlabelled = messages(settings(**weights))
    assert "the weights that the run starts from are not measured. evaluation.measure_start: nothing can" in unlabelled
    (image, *others) = sorted(path for path in (data / "val").rglob("*.*") if path.is_file())
    image.write_bytes(b"bad")
    assert "1 of 8 images to evaluate on that were tried cannot be decoded. Evaluations leave them" in messages(config)
    for path in others:
        path.write_bytes(b"bad")
    text = messages(config)
    assert "are not measured. 8 of 8 images to evaluate on that were tried cannot be decoded" in text
    assert "measured on 30" not in text
    with pytest.raises(DataError, match="8 of 8 images to evaluate on"):
        check_dry_run(change_settings(config, {"evaluation.every_epochs": 1}), 1, ["cpu"])


@pytest.mark.slow
def test_a_finished_run_is_evaluated_when_it_is_asked_for_later(plain, evaluated, labelled, settings_in, tmp_path):
    folder = Path(shutil.copytree(plain.logging.folder, tmp_path / "run"))
    config = settings_in(folder, **every_epoch(labelled))
    assert launch(config, ["cpu"]) == 0
    assert without_seconds(read_rows(config)) == without_seconds(read_rows(evaluated))[-1:]


@pytest.mark.slow
def test_images_without_labels_and_masks_are_refused_before_the_start(settings, labelled):
    config = settings(**{"evaluation.every_epochs": 1})
    with pytest.raises(DataError, match=r"nothing can be measured during training.*Set evaluation\.data to images"):
        check_start(config, 1, "cpu")
    check_start(settings(**every_epoch(labelled)), 1, "cpu")
    with pytest.raises(DataError, match=r"evaluation\.data: /missing/images does not exist"):
        check_start(settings(**every_epoch("/missing/images")), 1, "cpu")
    with pytest.raises(ConfigError, match="SURELY_UNSET is not set"):
        check_start(settings(**every_epoch("$SURELY_UNSET/images")), 1, "cpu")


@pytest.mark.slow
def test_over_training_is_said_while_the_run_goes_on_and_at_its_end(settings, labelled, monkeypatch, caplog, capfd):
    scores = iter((0.4, 0.6, 0.5, 0.45))
    monkeypatch.setattr(
        "dmtjepa.training.evaluation.Evaluator.measure",
        lambda evaluator, encoders: {"linear": next(scores), "student/linear": 0.4, "images": 1000},
    )
    config = settings(**every_epoch(labelled) | {"optimization.epochs": 4})
    assert launch(config, ["cpu"]) == 0
    warnings = [record for record in caplog.records if "Over-trained" in record.getMessage()]
    assert len(warnings) == 1  # three evaluations are too few to tell
    for text in (warnings[0].getMessage(), capfd.readouterr().err):
        assert "eval/linear was 60.0% at step 16 and is 45.0% now, although the loss went on falling" in text
        assert "take the best evaluation (evaluation.keep_best)" in text
    best = read_checkpoint(RunFolder.from_config(config).best_export)
    assert best["epoch"] == 2


@pytest.mark.parametrize(
    ("kept", "rows", "replaced"),
    [
        ({"evaluation": {"eval/linear": 0.6}}, [], False),  # its row was removed, as after a rollback
        ({"evaluation": {"eval/linear": 0.4}}, [{"step": 7, "eval/linear": 0.6}], True),
        ({}, [{"step": 3, "eval/linear": 0.9}, {"step": 7, "eval/linear": 0.6}], False),  # of an earlier version
        ({}, [{"step": 3, "eval/linear": 0.9}, {"step": 7, "eval/linear": 0.4}], True),
    ],
)
def test_the_file_of_the_best_tells_how_good_it_is(tmp_path, kept, rows, replaced):
    folder = RunFolder(tmp_path, "jepa")
    folder.metrics_file.write_text("".join(json.dumps(row | {"eval/seconds": 1.0}) + "\n" for row in rows))
    torch.save({"step": 8} | kept, folder.best_export)
    evaluation = PeriodicEvaluation.__new__(PeriodicEvaluation)
    evaluation._folder, evaluation._state = folder, SimpleNamespace(meta=lambda keep: {"step": 16, "epoch": 2})
    weights = {"weight": torch.zeros(2)}
    encoders = {"student": weights, "teacher": weights}
    evaluation._keep_if_best({"eval/miou": 0.9}, encoders)  # the linear probe failed
    assert read_checkpoint(folder.best_export)["step"] == 8
    evaluation._keep_if_best({"eval/linear": 0.5}, encoders)
    assert read_checkpoint(folder.best_export)["step"] == (16 if replaced else 8)


@pytest.mark.slow
def test_the_file_of_the_best_is_compared_with_what_it_holds(settings, labelled, monkeypatch):
    """Not with an earlier evaluation, whose weights were not kept."""
    scores = iter((0.6, 0.4, 0.5, 0.45))
    monkeypatch.setattr(
        "dmtjepa.training.evaluation.Evaluator.measure",
        lambda evaluator, encoders: {"linear": next(scores), "student/linear": 0.4, "images": 1000},
    )
    config = settings(**every_epoch(labelled) | {"optimization.epochs": 4, "evaluation.keep_best": False})
    run = PeriodicEvaluation.run

    def failing(evaluation):
        if evaluation._state.step == 16:
            raise RuntimeError("failed on purpose")
        run(evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(PeriodicEvaluation, "run", failing)
        with pytest.raises(RuntimeError, match="on purpose"):
            launch(config, ["cpu"])
    assert launch(change_settings(config, {"evaluation.keep_best": True}), ["cpu"]) == 0
    assert [row["eval/linear"] for row in read_rows(config)] == [0.6, 0.4, 0.5, 0.45]
    best = RunFolder.from_config(config).best_export
    kept = read_checkpoint(best)
    assert (kept["epoch"], kept["evaluation"]["eval/linear"]) == (3, 0.5)
    assert all(re.fullmatch("[0-9a-f]{16}", row["eval/images_digest"]) for row in read_rows(config))


@pytest.mark.parametrize(("step", "moment"), [(0, "before the first step"), (8, "after step 8")])
def test_what_could_not_be_evaluated_says_when(settings, monkeypatch, caplog, step, moment):
    def refuse(encoders, masks=False):
        raise EvaluationError("no images")

    for name in ("build_frozen_encoder", "first_fault"):
        monkeypatch.setattr(f"dmtjepa.training.evaluation.{name}", lambda *arguments: None)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    world = SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda"))
    network = torch.nn.Identity()
    state = SimpleNamespace(step=step, model=SimpleNamespace(encoder=network, teacher_encoder=network))
    watchdog = SimpleNamespace(on_phase=lambda *arguments: None)
    evaluation = PeriodicEvaluation(settings(), world, None, None, state, None, watchdog, StopSignals())
    evaluation._evaluator = SimpleNamespace(measure=refuse)
    evaluation.run()
    assert emptied == ["cache"]
    evaluation._evaluator = SimpleNamespace(draw=refuse)
    assert evaluation._draw(network) == {}
    assert [record.message for record in caplog.records] == [
        f"not evaluated {moment}: no images",
        f"no pictures {moment}: EvaluationError: no images",
    ]
