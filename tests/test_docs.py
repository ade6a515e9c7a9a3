"""What the documentation names exists: files, tests, modules, functions, make targets and links."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step import communication
from dmtjepa.config import load_config
from dmtjepa.evaluation.verdict import MOMENTA

ROOT = Path(__file__).parents[1]
TOP = "benchmarks|configs|dmtjepa|docs|examples|experiments|kernels|tests|tools"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
# Code names files too, in comments, docstrings and messages.
SOURCES = sorted(path for top in TOP.split("|") for path in (ROOT / top).rglob("*.py")) + [ROOT / "Makefile"]

# `path/file.py`, `file.py::test_name`, `::test_name` of the file named before; a placeholder is no name.
FILE = re.compile(rf"(?<![\w/.<])((?:{TOP})/[\w./-]+\.(?:py|md|yaml|json|ipynb|c|h|png))(?![\w*{{<])")
TEST = re.compile(r"([\w/]*test_\w+\.py)?::(test_\w+)")
BARE_TEST = re.compile(r"(?<![\w/])(test_\w+\.py)")
MODULE = re.compile(r"python -m ([\w.]+)")
DOTTED = re.compile(r"`((?:dmtjepa|benchmarks)(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
TARGET = re.compile(r"(?:`|^)make ([a-z][a-z-]*)", re.MULTILINE)
# Prose is British; names in the code are American.
AMERICAN = re.compile(
    r"(?<![\w.])((?:neighbor|color|behavior)\w*|center(?:ed|s)?|learned|gray|labeled|misspelled"
    r"|(?:normal|standard|quant|recogn|special|initial)iz\w+)\b(?!/)",
    re.IGNORECASE,
)
FOREIGN = {"NAME", "pytest", "pip", "torch.distributed.run", "venv", "mypy", "module"}


def find_test_file(name: str) -> Path:
    """The test file of this name or path."""
    direct = ROOT / name
    found = [direct] if direct.is_file() else sorted((ROOT / "tests").rglob(name))
    assert len(found) == 1, f"{name}: {len(found)} such test files"
    return found[0]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_named_files_exist():
    missing = {
        f"{name_of(path)}: {name}"
        for path in [*DOCUMENTS, *SOURCES]
        for name in FILE.findall(path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_tests_exist(path):
    text = path.read_text()
    for name in BARE_TEST.findall(text):
        find_test_file(name)
    file = None
    for name, test in TEST.findall(text):
        file = find_test_file(name) if name else file
        assert file is not None, f"::{test} follows no file"
        assert test in functions_of(file), f"{name_of(file)} has no {test}"


def test_named_programs_exist():
    for path in [*DOCUMENTS, *SOURCES]:
        for name in set(MODULE.findall(path.read_text())) - FOREIGN:
            place = ROOT.joinpath(*name.rstrip(".").split("."))
            exists = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
            assert exists, f"{name_of(path)}: python -m {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_functions_and_modules_exist(path):
    for name in set(DOTTED.findall(path.read_text())):
        owner, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(owner), attribute), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    missing = [target for target in LINK.findall(path.read_text()) if not (path.parent / target).exists()]
    assert not missing


def anchor_of(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower().strip()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_to_sections_lead_to_one(path):
    for file, anchor in re.findall(r"\]\(([^)#: ]*)#([^)]+)\)", path.read_text()):
        page = path.parent / file if file else path
        headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        assert anchor in map(anchor_of, headings), f"{file}#{anchor}"


def test_every_fault_names_its_tests():
    tables, tests = (ROOT / "docs/faults.md").read_text().split("## Tests\n")
    faults = re.findall(r"^\| ([A-Z])(\d+) \|", tables, re.MULTILINE)
    assert re.findall(r"^\* ([A-Z])(\d+): `\w.*::test_", tests, re.MULTILINE) == faults
    for letter in dict(faults):
        numbers = [int(number) for first, number in faults if first == letter]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_prose_has_one_spelling(path):
    prose = re.sub(r"^```.*?^```$|^ {4}\S.*$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|^::: .*$", "", prose, flags=re.MULTILINE)
    assert not AMERICAN.findall(prose)


def test_there_is_one_rule_for_the_first_momentum():
    for page in ("small_images", "settings"):
        assert MOMENTA in (ROOT / f"docs/{page}.md").read_text()
    quickstart = load_config(ROOT / "configs/quickstart.yaml")
    steps = quickstart.optimization.epochs * (4000 // quickstart.data.batch_size)
    assert steps < 3000
    assert quickstart.optimization.ema[0] == 0.98


def test_the_predictions_for_many_gpus_are_quoted(capsys):
    communication.main()
    text = (ROOT / "docs/cluster.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 2 * 3 * 2 + 2 * 2
    assert not [row for row in rows if row not in text]
    for steps in communication.MEASURED.values():
        assert f" {1000 * steps['H200']:.0f}, measured |" in text


def test_every_history_of_the_verdict_is_in_its_table():
    text = (ROOT / "docs/training_figures.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \|$", text.split("| made to fail by |")[1], re.MULTILINE)
    names = [path.stem for path in (ROOT / "tests/evaluation/histories").glob("*.jsonl")]
    healthy = [name for name in names if name.startswith("healthy")]
    assert (len(rows), len(healthy)) == (len(names) - len(healthy), 7)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for path in DOCUMENTS for target in TARGET.findall(path.read_text())}
    assert named <= targets


@pytest.mark.slow
def test_the_site_has_every_page_and_no_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = {path.with_suffix("").name for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert pages == {path.stem for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.ipynb")]}
    reference = (tmp_path / "site/reference.html").read_text()
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/reference.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in reference
