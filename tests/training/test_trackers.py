"""Loggers of other projects: what they get, that a later start continues their run, and that none stops training."""

from __future__ import annotations

import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from dmtjepa.config import ConfigError, parse_config
from dmtjepa.run_folder import RunFolder
from dmtjepa.training import trackers
from dmtjepa.training.launch import launch
from dmtjepa.training.trackers import TrackerThread, check_loggers, open_trackers

CONFIG = parse_config({"logging": {"loggers": ["wandb"], "project": "birds"}, "optimization": {"lr": 0.002}})


class Recorder:
    """A tracker that keeps what it gets."""

    identifier = "recorded"

    def __init__(self) -> None:
        self.rows, self.closed = [], False

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed = True


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging.loggers: wandb is not installed: pip install wandb"):
        check_loggers(CONFIG)
    check_loggers(parse_config({}))


def test_a_folder_of_earlier_runs_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_loggers(CONFIG)


def test_a_logger_that_takes_no_pictures_still_gets_rows(tmp_path, caplog):
    recorder = Recorder()
    recorder.log_pictures = lambda step, pictures: 1 / 0
    thread = TrackerThread("mlflow", lambda *_: recorder, CONFIG, RunFolder(tmp_path, "jepa"))
    for step in range(3):
        thread.log_pictures(step, {"figures/pca": b""})
        thread.log(step, {"train/loss": 1.0})
    thread.close()
    assert [step for step, _ in recorder.rows] == [0, 1, 2]
    assert "mlflow gets no more pictures: ZeroDivisionError: division by zero" in caplog.text


def test_rows_arrive_in_their_order_and_without_what_is_no_number(tmp_path):
    recorder = Recorder()
    thread = TrackerThread("wandb", lambda *_: recorder, CONFIG, RunFolder(tmp_path, "jepa"))
    for step in range(5):
        thread.log(step, {"train/loss": step, "eval/linear": float("nan"), "eval/note": "text", "eval/none": None})
    thread.close()
    assert recorder.rows == [(step, {"train/loss": step}) for step in range(5)]
    assert recorder.closed


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_logger_that_fails_warns_once(tmp_path, caplog, when):
    def fail(*_):
        raise SystemExit("no such project")  # as some of them do

    recorder = Recorder()
    if when != "open":
        setattr(recorder, when, fail)
    thread = TrackerThread(
        "wandb", fail if when == "open" else lambda *_: recorder, CONFIG, RunFolder(tmp_path, "jepa")
    )
    for step in range(5):
        thread.log(step, {"train/loss": 1.0})
    thread.close()
    thread.close()
    (record,) = [record for record in caplog.records if "not used any more" in record.message]
    assert "wandb is not used any more, and training goes on: SystemExit: no such project" in record.message


def test_training_does_not_wait_for_a_slow_logger(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    answer, recorder = threading.Event(), Recorder()
    recorder.log = lambda *_: answer.wait(600)
    thread = TrackerThread("mlflow", lambda *_: recorder, CONFIG, RunFolder(tmp_path, "jepa"))
    for step in range(20):
        thread.log(step, {"train/loss": 1.0})
    thread.close()
    assert [record.message for record in caplog.records] == [
        "mlflow is not used any more, and training goes on: it is behind by 3 rows"
    ]
    answer.set()


def test_a_later_start_continues_the_run_of_wandb(tmp_path, monkeypatch):
    calls, logged = [], []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "new", url=None, dir="here", log=logged.append,
            define_metric=lambda *names, **options: None, finish=lambda: None,
        )  # fmt: skip

    module = ModuleType("wandb")
    module.init, module.Settings = init, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = RunFolder(tmp_path, "jepa")
    for step in (7, 5):  # the second start goes back
        (thread,) = open_trackers(CONFIG, folder)
        thread.log(step, {"train/loss": 1.0})
        thread.close()
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new", "allow")]
    assert calls[0]["project"] == "birds"
    assert calls[0]["config"]["optimization"]["lr"] == 0.002
    assert logged == [{"train/loss": 1.0, "step": 7}, {"train/loss": 1.0, "step": 5}]
    assert json.loads((tmp_path / "logger_ids.json").read_text()) == {"wandb": "new"}


@pytest.mark.slow
def test_wandb_and_mlflow_get_what_the_metrics_get(settings, labelled, monkeypatch, tmp_path):
    """The real ones, without a network, in a run and in a second start of it."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    changes = {"optimization.epochs": 1, "optimization.warmup": 0, "logging.loggers": ["wandb", "mlflow"]}
    config = settings(**changes | {"evaluation.every_epochs": 1, "evaluation.data": str(labelled)})
    folder = RunFolder.from_config(config)
    assert launch(config, ["cpu"]) == 0
    identifiers = folder.read_logger_ids()
    assert set(identifiers) == {"wandb", "mlflow"}
    assert launch(config, ["cpu"]) == 0
    assert folder.read_logger_ids() == identifiers
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    expected = [(row["step"], row["train/loss"]) for row in folder.read_metrics() if "train/loss" in row]
    history = client.get_metric_history(identifiers["mlflow"], "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == expected
    pictures = [file.path for file in client.list_artifacts(identifiers["mlflow"], "images")]
    names = "masks", "neighbors", "pca", "nearest"
    assert all(any(f"figures~{name}" in path and path.endswith(".png") for path in pictures) for name in names)
    run = client.get_run(identifiers["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimization.lr"] == "0.002"
    files = list((folder.path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert all(identifiers["wandb"] in path.name for path in files)
    pictures = (folder.path / "wandb").glob("offline-run-*/files/media/images/figures/*.jpg")
    assert {path.name.split("_")[0] for path in pictures} == set(names)
    assert b"targets/explained_variance" in b"".join(path.read_bytes() for path in files)
