"""The folder of a run: claimed by one run at a time, of one configuration, with what is needed to repeat it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from dmtjepa.config import Config, ConfigError, parse_config
from dmtjepa.errors import UserError
from dmtjepa.processes import private_descriptor

# What may differ between two starts of a run, as it does not change what is trained. The batch of a device and the
# accumulation may differ where the global batch stays the same.
FREE_SECTIONS = ("evaluation",)
FREE_KEYS = (
    "data.batch_size", "data.num_workers", "data.pin_mem", "data.root_path", "data.worker_timeout", "data.max_broken",
    "logging.folder", "meta.copy_data", "meta.load_checkpoint", "meta.read_checkpoint",
    "optimization.max_skipped_steps",
)  # fmt: skip
FIXED_RUNTIME_KEYS = ("runtime.seed",)
PACKAGES = ("torch", "torchvision", "triton", "xformers", "numpy", "submitit", "nvidia-dali-cuda130")


class RunFolderError(UserError, ValueError):
    """A run folder that belongs to another run or configuration; nothing in it was changed."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, created where missing, against a second run that would write into it.

    Raises RunFolderError where another process holds it. File systems without locks are not protected.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise RunFolderError(f"{folder} (logging.folder) cannot be written to: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"{folder} is being written by another run; choose another logging.folder") from None
        except OSError:
            pass
        with private_descriptor(file.fileno()):
            yield


def check_folder(folder: Path, config: Config, global_batch: int) -> None:
    """Refuse a folder that holds another run. Changes nothing.

    Raises RunFolderError naming the keys that differ, with both values.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        tag = config.logging.write_tag
        outputs = (f"{tag}_r0.csv", f"{tag}-latest.pth.tar", "checkpoints")
        strangers = [name for name in outputs if (folder / name).exists()]
        if strangers:
            raise RunFolderError(
                f"{folder} holds {', '.join(strangers)} but no config.yaml: another program's run? "
                f"choose another logging.folder"
            )
        return
    try:
        earlier = parse_config(yaml.safe_load(saved.read_text()), source=str(saved))
    except (ConfigError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder} holds a run of another version: {error}") from None
    old, new = _flatten(earlier.model_dump(mode="json")), _flatten(config.model_dump(mode="json"))
    differing = [
        f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not _is_free(key)
    ]
    starts = _read_starts(folder)
    if starts and starts[0]["global_batch"] != global_batch:
        differing.append(
            f"  global batch (data.batch_size x processes x runtime.accumulation): {starts[0]['global_batch']} there, "
            f"{global_batch} now"
        )
    if differing:
        rows = "\n".join(differing)
        raise RunFolderError(
            f"{folder} holds a run with other settings; choose another logging.folder, or restore:\n{rows}"
        )


def write_settings(folder: Path, config: Config) -> None:
    """Save the resolved settings, where they are not yet."""
    saved = folder / "config.yaml"
    if not saved.exists():
        writing = folder / ".config.yaml"
        writing.write_text(config.to_yaml())
        os.replace(writing, saved)


def write_environment(folder: Path, world_size: int, device: torch.device, global_batch: int, step: int) -> None:
    """Add this start to `environment.json`: command, commit, versions, hardware."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processes": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "global_batch": global_batch,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    writing = folder / ".environment.json"
    writing.write_text(json.dumps({"starts": [*_read_starts(folder), start]}, indent=1))
    os.replace(writing, folder / "environment.json")


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "environment.json"
    return json.loads(path.read_text())["starts"] if path.is_file() else []


def _is_free(key: str) -> bool:
    section = key.partition(".")[0]
    free_runtime = section == "runtime" and key not in FIXED_RUNTIME_KEYS
    return key in FREE_KEYS or section in FREE_SECTIONS or free_runtime


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this source tree, with `+changes` where files differ from it; None outside of git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status.strip() else "")
