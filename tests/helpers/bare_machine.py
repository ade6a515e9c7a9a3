"""A machine with PyTorch and Triton alone, and the wheels that it lacks, both made of the packages installed here."""

from __future__ import annotations

import importlib.metadata
import shutil
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
THERE = ("torch", "triton")
CHECKOUT = ("benchmarks", "configs", "dmtjepa", "kernels", "tests", "pyproject.toml")


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with `THERE` and what these need, and nothing else; returns its interpreter."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for distribution in find_distributions(THERE).values():
        for file in distribution.files:
            # Several distributions share the folder nvidia, and not all of them are needed.
            place = Path(*file.parts[: 2 if file.parts[0] == "nvidia" else 1])
            target = packages / place
            if file.parts[0] not in ("..", "__pycache__") and not target.exists():
                target.parent.mkdir(exist_ok=True)
                target.symlink_to(distribution.locate_file(place))
    return folder / "bin" / "python"


def pack_wheels(folder: Path, names: Iterable[str]) -> None:
    """Pack installed distributions, and what they need beside `THERE`, into files that unpack as their wheels do."""
    there = find_distributions(THERE)
    folder.mkdir(parents=True)
    for name, distribution in find_distributions(names).items():
        if name in there:
            continue
        with zipfile.ZipFile(folder / f"{name}-{distribution.version}.whl", "w") as wheel:
            for file in distribution.files:
                if file.parts[0] != ".." and file.suffix != ".pyc":
                    wheel.write(file.locate(), str(file))


def copy_checkout(folder: Path) -> None:
    """Copy what `gpu_check` needs of this checkout; there is no repository around it."""
    folder.mkdir(parents=True)
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)


def find_distributions(names: Iterable[str]) -> dict[str, Distribution]:
    """Installed distributions of these names and of all that they need, by name."""
    found: dict[str, Distribution] = {}
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        needed = map(Requirement, found[name].requires or [])
        left += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found
