"""Loggers of other projects, Weights & Biases and MLflow, which get what `metrics.jsonl` gets.

They are imported only if `logging.loggers` names them. Each has a thread of its own, so that training never waits for a
server, and one that fails says so once and is not used any more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from PIL import Image

from dmtjepa.config import Config, ConfigError
from dmtjepa.run_folder import RunFolder

logger = logging.getLogger(__name__)

PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Of each logger: the module, and what pip installs."""
MAX_WAITING = 1000
"""Rows that wait for a slow server. What comes on top is lost."""
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for them."""


class Tracker(Protocol):
    """A logger. `identifier` is its name for the run, by which a later start continues it."""

    identifier: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None: ...

    def close(self) -> None: ...


OpenTracker: TypeAlias = Callable[[Config, RunFolder, "str | None"], Tracker]
_IDENTIFIERS = threading.Lock()


def check_loggers(config: Config) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ConfigError: the message says how to install them.
    """
    for name in config.logging.loggers:
        module, package = PACKAGES[name]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:  # a folder `wandb` of earlier runs counts as a package without files
            raise ConfigError(f"logging.loggers: {name} is not installed: pip install {package}")


def open_trackers(config: Config, folder: RunFolder) -> list[TrackerThread]:
    """Start the loggers that the settings name. Rank 0 calls this."""
    openers: dict[str, OpenTracker] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    return [TrackerThread(name, openers[name], config, folder) for name in dict.fromkeys(config.logging.loggers)]


class TrackerThread:
    """Feeds a logger from a thread.

    Args:
        name: of the logger, a key of `logger_ids.json`.
        open_tracker: called in the thread with the settings, the run folder and the identifier that an earlier start
            got, or None.
        config, folder: of the run.
    """

    def __init__(self, name: str, open_tracker: OpenTracker, config: Config, folder: RunFolder) -> None:
        self._name, self._failed, self._takes_pictures = name, False, True
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_WAITING)
        arguments = (open_tracker, config, folder)
        self._thread = threading.Thread(target=self._work, args=arguments, name=f"logger {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand over a row, without waiting. Values that are not finite numbers are left out."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._hand_over(lambda tracker: tracker.log(step, numbers))

    def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Hand over pictures, JPEG files by name, without waiting."""
        if pictures and self._takes_pictures:
            self._hand_over(lambda tracker: self._send_pictures(tracker, step, pictures))

    def _send_pictures(self, tracker: Tracker, step: int, pictures: Mapping[str, bytes]) -> None:
        """A server that has no place for files still gets the figures."""
        try:
            tracker.log_pictures(step, pictures)
        except Exception as error:
            self._takes_pictures = False
            logger.warning("%s gets no more pictures: %s: %s", self._name, type(error).__name__, error)

    def _hand_over(self, call: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"it is behind by {MAX_WAITING} rows")

    def close(self) -> None:
        """Wait until everything is handed over, for some time at most."""
        if self._failed:
            return
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"it took more than {CLOSE_SECONDS:.0f} seconds at the end")

    def _work(self, open_tracker: OpenTracker, config: Config, folder: RunFolder) -> None:
        try:
            tracker = open_tracker(config, folder, folder.read_logger_ids().get(self._name))
            with _IDENTIFIERS:
                folder.write_logger_ids(folder.read_logger_ids() | {self._name: tracker.identifier})
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # they raise errors of many kinds, also SystemExit
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("%s is not used any more, and training goes on: %s", self._name, reason)


class WandbTracker:
    """A run of Weights & Biases. WANDB_MODE=offline writes it into the run folder, for `wandb sync`."""

    def __init__(self, config: Config, folder: RunFolder, identifier: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=config.logging.project,
            name=folder.path.resolve().name,
            id=identifier,
            resume="allow" if identifier else None,
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(login_timeout=30, console="off", silent=True),
        )
        self.identifier = self._run.id
        logger.info("wandb: %s", self._run.url or self._run.dir)
        # A run that goes back to a checkpoint repeats steps; W&B's own counter could not.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        import wandb

        images = {name: wandb.Image(Image.open(io.BytesIO(data)), file_type="jpg") for name, data in pictures.items()}
        self._run.log({**images, "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow, at MLFLOW_TRACKING_URI. The settings are its parameters."""

    def __init__(self, config: Config, folder: RunFolder, identifier: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if identifier is not None:
            self.identifier = identifier
            self._client.update_run(identifier, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.logging.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.logging.project)
        run = self._client.create_run(number, run_name=folder.path.resolve().name)
        self.identifier = run.info.run_id
        parameters = [
            Param(f"{section}.{name}", str(value))
            for section, values in config.model_dump(mode="json").items()
            for name, value in values.items()
        ]
        for start in range(0, len(parameters), 100):  # as many as the server takes at once
            self._client.log_batch(self.identifier, params=parameters[start : start + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        self._client.log_batch(
            self.identifier, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        for name, data in pictures.items():
            image = Image.open(io.BytesIO(data))
            # Names of its files hold the step, of which its pages expect a number from 0.
            self._client.log_image(self.identifier, image, key=name, step=max(step, 0), synchronous=True)

    def close(self) -> None:
        self._client.set_terminated(self.identifier)
