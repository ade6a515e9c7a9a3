"""Imports point one way, nothing heavy happens at import, and every folder of code is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]

RUNS = {"checkpoint_format", "config", "errors", "files", "run_folder", "step_csv"}

# What each part may import of the project; a part may always import itself.
ALLOWED = {
    "kernels": set(),
    "errors": set(),
    "processes": set(),
    "files": set(),
    "checkpoint_reader": {"errors"},
    "checkpoint_format": {"checkpoint_reader", "files"},
    "environment": set(),
    "step_csv": {"files"},
    "run_folder": {"checkpoint_format", "config", "environment", "errors", "files", "processes", "step_csv"},
    "config": {"errors"},
    "packing": set(),
    "masks": {"config", "errors", "packing"},
    "data": {"config", "errors", "processes"},
    "models": {"kernels", "packing"},
    "objective": {"kernels", "config", "masks", "models"},
    "reference": {"config", "masks"},
    "interop": RUNS | {"models", "objective"},
    "training": RUNS | {"data", "masks", "models", "objective", "interop", "kernels", "processes"},
    "evaluation": RUNS | {"data", "masks", "models", "objective", "interop", "kernels"},
}


def files_of(part: str) -> list[Path]:
    folder = ROOT / "kernels" if part == "kernels" else ROOT / "dmtjepa" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_part_has_its_rule():
    parts = {path.stem for path in (ROOT / "dmtjepa").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert parts - {"__init__", "__pycache__"} == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    for path in files_of(part):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("dmtjepa.") and name.count(".") >= 1}
        used &= set(ALLOWED)
        assert used - {part} <= ALLOWED[part], f"{path.relative_to(ROOT)} imports {sorted(used - {part})}"


def test_operators_need_torch_and_triton_alone():
    standard = sys.stdlib_module_names
    for path in files_of("kernels"):
        foreign = {name.split(".")[0] for name in imported(path)} - standard - {"torch", "triton", "dmtjepa"}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_every_folder_of_code_is_packaged():
    packages = set(find_packages(str(ROOT), include=["dmtjepa", "dmtjepa.*"]))
    folders = {path.parent for path in (ROOT / "dmtjepa").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"dmtjepa.kernels"}
    assert names <= packages


def test_import_touches_neither_gpu_nor_processes():
    script = (
        "import torch, threading; import dmtjepa.objective, dmtjepa.training.loop;"
        "assert not torch.cuda.is_initialized(); assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=600)
