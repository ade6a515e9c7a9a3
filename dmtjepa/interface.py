"""Training and evaluation from Python: what `dmtjepa train` and `dmtjepa evaluate` do, for notebooks and scripts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist

from dmtjepa.config import Config, change_settings, find_settings, load_config
from dmtjepa.devices import check_device
from dmtjepa.errors import UserError
from dmtjepa.evaluation.formatting import Report
from dmtjepa.evaluation.report import evaluate as write_report
from dmtjepa.evaluation.splits import find_splits
from dmtjepa.evaluation.subject import find_subject
from dmtjepa.training.launch import run_process

ALLOCATOR = "PYTORCH_ALLOC_CONF"


class InterfaceError(UserError, RuntimeError):
    """`train` was called where it cannot train."""


def train(
    config: Config | str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
) -> Path:
    """Train in this process, or continue to train.

    run = dmtjepa.train("small_images", {"data.root_path": "photos", "logging.folder": "runs/mine"})

    For several devices, use `dmtjepa train` or torchrun. Random numbers of the CPU, signal handlers and logging are
    the same afterwards as before.

    Args:
        config: settings, a settings file, or the name of settings that are part of the package, such as `quickstart`.
        overrides: settings that replace those of `config`, by `section.key`.
        device: `cpu`, `cuda` or `cuda:N`. None takes the first GPU, and the CPU if there is none.

    Returns:
        The run folder, `logging.folder`. If it holds the run already, that is continued; a finished one is returned.

    Raises:
        KeyboardInterrupt: after Ctrl-C, or when a notebook is interrupted. The run has finished its step and is saved.
            A second Ctrl-C ends it at once, and nothing is saved. Other stop signals go to their previous handlers.
        UserError: the settings do not allow a single step, the folder holds another run, or the run failed; the message
            says what to do.
    """
    if isinstance(config, Config):
        settings = change_settings(config, overrides or {})
    else:
        settings = load_config(find_settings(os.fspath(config)), overrides or {})
    name = device or _default_device()
    check_device(name)
    _check_process()
    with _restored_state():
        outcome = run_process(settings, name)
    if not outcome.complete:
        signal.raise_signal(outcome.signals[-1])
    return settings.logging.path


def evaluate(
    source: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    train: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    max_images: int | None = None,
    quick: bool = False,
    num_workers: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Report:
    """Measure the teacher and the student of a run, or weights by themselves, and write the report.

    report = dmtjepa.evaluate("runs/mine")
    print(report.linear["trained"], report.linear["untrained"])

    Args:
        source: a run folder; or weights by themselves, for which `data` is needed: a file, a folder of Hugging Face or
            timm, or the name of a repository of Hugging Face.
        data: images to measure on: a folder, a file list or tar shards. None takes those of the run.
        train: labelled images to compare with, instead of `data`; needs `validation`.
        validation: labelled images to classify; needs `train`.
        checkpoint: the file to measure. None takes the latest of the run.
        out: the folder of the report. None takes `report` in the run folder, or a folder beside the weights.
        max_images: upper limit for the images of each split.
        quick: leave out low-shot and attentive probes, and the probe of the last four layers.
        num_workers: processes that load images.
        device: `cpu`, `cuda` or `cuda:N`. None takes the first GPU, and the CPU if there is none.
        progress: show progress bars.

    Returns:
        The numbers of the report. Its `files` are on disk.

    Raises:
        UserError: the run, the weights or the images cannot be read; the message says why.
    """
    where = check_device(device or _default_device())
    given, first, second, file, folder = map(_as_path, (data, train, validation, checkpoint, out))
    subject = find_subject(Path(source), has_images=given is not None or first is not None, checkpoint=file, out=folder)
    splits = find_splits(subject.config.data, data=given, train=first, validation=second, max_images=max_images)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        return write_report(
            subject,
            splits,
            device=where,
            num_workers=num_workers,
            progress=progress,
            quick=quick,
        )


def _as_path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _default_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _check_process() -> None:
    """Refuse a process in which no run can be started. Raises InterfaceError."""
    if threading.current_thread() is not threading.main_thread():
        raise InterfaceError("dmtjepa.train must be called in the main thread, the only one that receives signals")
    if os.environ.get("RANK"):
        raise InterfaceError(
            "dmtjepa.train trains in one process, and RANK is set: under torchrun, run `dmtjepa train`"
        )
    if dist.is_initialized():
        raise InterfaceError(
            "this process is part of a process group already; call torch.distributed.destroy_process_group() first"
        )


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    """Put back what a run changes in its process. Within the block, an interrupt never ends the process itself."""
    root = logging.getLogger()
    streams, handlers, level = (sys.stdout, sys.stderr), root.handlers[:], root.level
    allocator, interrupt = os.environ.get(ALLOCATOR), signal.getsignal(signal.SIGINT)
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    compiler = torch._functorch.config
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise_interrupt)
    try:
        devices = [] if current is None else range(torch.cuda.device_count())
        with (
            torch.random.fork_rng(devices),
            compiler.patch(activation_memory_budget=compiler.activation_memory_budget),
        ):
            yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        sys.stdout, sys.stderr = streams
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.pop(ALLOCATOR, None)
        if allocator is not None:
            os.environ[ALLOCATOR] = allocator
        if current is not None:
            torch.cuda.set_device(current)


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    """As Python's own handler. A run takes that one for a command line, which ends without a traceback."""
    raise KeyboardInterrupt
