"""The phases of training that the watchdog reports and profiles show."""

from __future__ import annotations

from enum import Enum


class Phase(str, Enum):
    """What a rank is doing. `TARGETS` to `TEACHER` are the parts of a training step, in their order."""

    STARTING = "starting"
    DATA = "data"
    TARGETS = "targets"
    PREDICTIONS = "predictions"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    TEACHER = "teacher"
    LOGGING = "logging"
    SAVING = "saving"
    EVALUATION = "evaluation"

    def __str__(self) -> str:
        return self.value
