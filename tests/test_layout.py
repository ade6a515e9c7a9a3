"""Imports point one way, nothing heavy happens at import, and every folder of code is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]

RUNS = {
    "checkpoint_format", "checkpoint_reader", "config", "errors", "files", "log_file", "metrics_file", "output",
    "run_folder", "step_csv",
}  # fmt: skip

# What each part may import of the project; a part may always import itself.
ALLOWED = {
    "kernels": set(),
    "errors": set(),
    "devices": {"errors"},
    "processes": set(),
    "arguments": set(),
    "cli": RUNS | {"arguments", "data", "devices", "evaluation", "interop", "training"},
    "files": set(),
    "checkpoint_reader": {"errors"},
    "checkpoint_format": {"checkpoint_reader", "files"},
    "environment": set(),
    "log_file": set(),
    "output": set(),
    "step_csv": {"errors", "files", "log_file"},
    "metrics_file": {"files", "log_file"},
    "run_folder": {
        "checkpoint_format",
        "config",
        "environment",
        "errors",
        "files",
        "metrics_file",
        "processes",
        "step_csv",
    },
    "config": {"errors"},
    "packing": set(),
    "tensors": set(),
    "masks": {"config", "errors", "packing"},
    "data": {"config", "errors", "files", "output", "processes"},
    "models": {"kernels", "packing"},
    "pretrained": {"config", "data", "devices", "interop", "models"},
    "interface": RUNS | {"devices", "evaluation", "training"},
    "objective": {"kernels", "config", "masks", "models", "tensors"},
    "reference": {"config", "masks", "objective"},
    "interop": RUNS | {"models", "objective"},
    "training": RUNS
    | {
        "data",
        "evaluation",
        "devices",
        "masks",
        "models",
        "objective",
        "interop",
        "kernels",
        "processes",
        "tensors",
    },
    "evaluation": RUNS | {"data", "masks", "models", "objective", "interop", "kernels"},
}


def files_of(part: str) -> list[Path]:
    folder = ROOT / "kernels" if part == "kernels" else ROOT / "dmtjepa" / part
    # `python -m` runs a command of dmtjepa.cli: nothing imports these.
    return sorted(set(folder.rglob("*.py")) - set(folder.rglob("__main__.py"))) or [folder.with_suffix(".py")]


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
    assert parts - {"__init__", "__main__", "__pycache__", "configs"} == set(ALLOWED)


def test_every_part_and_every_module_of_training_is_in_the_design():
    text = (ROOT / "docs" / "design.md").read_text()
    training = {path.stem for path in (ROOT / "dmtjepa" / "training").glob("*.py")}
    training -= {"__init__", "loop", "fork_server_start"}
    names = {f"`{name}.py`" for name in training} | {
        f"`{part}/`" if (ROOT / "dmtjepa" / part).is_dir() else f"`{part}.py`" for part in ALLOWED
    }
    missing = {name for name in names if name not in text}
    assert not missing, f"docs/design.md does not explain {sorted(missing)}"


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


@pytest.mark.slow
def test_import_touches_neither_gpu_nor_processes():
    script = (
        "import torch, threading; import dmtjepa.objective, dmtjepa.training.loop;"
        "assert not torch.cuda.is_initialized(); assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=600)


# ---- Sizes and cycles

CODE = ("dmtjepa", "kernels", "benchmarks", "experiments", "tools")
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60
# Longer functions, and why.
LONG_FUNCTIONS: dict[str, str] = {}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; kernels under its own, not under dmtjepa.kernels."""
    found = {}
    for top in CODE:
        for path in sorted((ROOT / top).rglob("*.py")):
            if not path.is_relative_to(ROOT / "dmtjepa" / "kernels"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def needed_at_import(module: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the project that a module imports when it is imported itself: not in functions, not for types."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pass
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text()))
    found = {name.removeprefix("dmtjepa.") if name.startswith("dmtjepa.kernels") else name for name in found}
    # `from package import module` needs the module; the package itself is what is being imported already.
    ancestors = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
    return (found & known) - {module} - ancestors


def test_modules_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES}


def test_functions_are_short():
    too_long = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long[f"{name}.{node.name}"] = length
    assert too_long.keys() == LONG_FUNCTIONS.keys(), too_long


def test_no_import_cycle():
    paths = modules()
    needs = {name: needed_at_import(name, path, set(paths)) for name, path in paths.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for needed in sorted(needs[name]):
                visit(needed, (*trail, name))
            finished.add(name)

    for name in needs:
        visit(name, ())


def test_tests_share_code_in_helpers_alone():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        used = {name for name in imported(path) if name.split(".")[0] == "tests"}
        assert all(name.split(".")[1:2] in ([], ["helpers"]) for name in used), f"{path.relative_to(ROOT)}: {used}"
