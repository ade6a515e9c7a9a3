"""The files of pins name the same packages, the ranges of setup.py admit them, and docs/versions.md quotes them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = sorted(file.name for file in ROOT.glob("constraints*.txt"))


def read_pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines), "a package is named twice"
    return {canonicalize_name(name): version for name, version in pins.items()}


@pytest.fixture
def arguments(monkeypatch) -> dict:
    """What setup.py passes to setuptools."""
    given: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path("setup.py")
    return given


def test_all_files_name_the_same_packages():
    assert FILES == ["constraints-newest.txt", "constraints-oldest.txt", "constraints.txt"]
    names = {file: sorted(read_pins(file)) for file in FILES}
    assert names["constraints-newest.txt"] == names["constraints-oldest.txt"] == names["constraints.txt"]


@pytest.mark.parametrize("file", FILES)
def test_setup_admits_the_pins(file, arguments):
    pins = read_pins(file)
    texts = list(arguments["install_requires"])
    for name, packages in arguments["extras_require"].items():
        texts += packages if name != "loggers" else []  # optional services, of which tests use stand-ins
    for text in texts:
        requirement = Requirement(text)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"setup.py: {text}; {file}: {version}"


def test_the_page_on_weights_quotes_the_pins():
    quoted = re.search(
        r"timm ([\d.]+) and transformers ([\d.]+) and\s+([\d.]+)\)?;", (ROOT / "docs/weights.md").read_text()
    )
    pins = [read_pins(file) for file in FILES]
    assert {quoted[1]} == {pin["timm"] for pin in pins}
    assert {quoted[2], quoted[3]} == {pin["transformers"] for pin in pins}


@pytest.mark.parametrize("file", FILES)
def test_the_documentation_quotes_the_pins(file):
    pins = read_pins(file)
    row = re.search(rf"^\| `{re.escape(file)}`.*$", (ROOT / "docs/versions.md").read_text(), re.MULTILINE)[0]
    assert row.split("|")[3:6] == [f" {pins[name]} " for name in ("torch", "triton", "xformers")]
