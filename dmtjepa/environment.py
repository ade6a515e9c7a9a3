"""What a run was started with: command, commit, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
PACKAGES = ("torch", "torchvision", "triton", "xformers", "numpy", "submitit", "nvidia-dali-cuda130")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """This process and its machine, as values for JSON."""
    return {
        "time": time.strftime(TIME_FORMAT),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this source tree, followed by `+changes` if files differ from it. None outside of git."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return commit + ("+changes" if status else "")


def _git(*arguments: str) -> str | None:
    """The output of a git command about this source tree; None if it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
