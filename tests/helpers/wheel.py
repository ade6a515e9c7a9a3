"""The wheel that users install, built as a package index would build it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])(sys.argv[2])"


def build_wheel(folder: Path) -> Path:
    """Build a wheel from an sdist of the files that git knows, as they are now; returns its path.

    Skips the test outside of a checkout.

    Args:
        folder: an empty one to work in.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):  # it may have been deleted
            target = folder / "checkout" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    _build("build_sdist", folder / "checkout", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    _build("build_wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _build(what: str, source: Path, target: Path) -> None:
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-c", BUILD, what, str(target)]
    subprocess.run(command, cwd=source, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
