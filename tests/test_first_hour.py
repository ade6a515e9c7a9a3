"""Every command of docs/first_hour.md prints what the page says, with the package as a wheel installs it.

`DMTJEPA_ENVIRONMENT=FOLDER` names a virtual environment in which the wheel was installed by pip, with its extras
dali and export and nothing else; without it, the content of the wheel is used with the packages of this environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.wheel import build_wheel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/first_hour.md"
BLOCK = re.compile(
    r'^```(?P<kind>console|python)(?: title="(?P<title>[\w.]+)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE
)


def commands_of(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it should print."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", part)[0]
        found.append((command, part[len(command) :]))
    return found


def matches(printed: str, expected: str) -> bool:
    """Whether a text is the expected one, in which `...` stands for any text."""
    pattern = ".*?".join(map(re.escape, expected.strip().split("...")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.fixture
def photos(tmp_path):
    """48 and 16 photographs of 2 classes: smooth noise."""
    draw = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 8)):
        for label in ("cats", "dogs"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for name in range(number):
                pixels = draw.integers(0, 255, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg")
    return tmp_path


@pytest.mark.slow
def test_every_command_prints_what_the_page_says(photos, tmp_path_factory):
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    if "DMTJEPA_ENVIRONMENT" in os.environ:
        programs = Path(os.environ["DMTJEPA_ENVIRONMENT"]).absolute() / "bin"
        environment.pop("PYTHONPATH", None)
    else:
        for package in ("nvidia.dali", "timm", "transformers"):
            pytest.importorskip(package)
        programs = Path(sys.executable).parent
        installed = tmp_path_factory.mktemp("installed")
        with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
            archive.extractall(installed)
        environment["PYTHONPATH"] = str(installed)
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    ran = 0
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["kind"] == "python":
            (photos / block["title"]).write_text(block["text"])
            continue
        for command, expected in commands_of(block["text"]):
            done = subprocess.run(
                command, shell=True, cwd=photos, env=environment, text=True, timeout=1200,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert done.returncode == 0, f"$ {command}{done.stdout}"
            assert matches(done.stdout, expected), f"$ {command}{done.stdout}\n---- expected\n{expected}"
            ran += 1
    assert ran == 8
