"""docs/settings.md is made from the schema."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from dmtjepa.config import Config, resume_rules
from dmtjepa.config.documentation import describe_values, make_markdown

ROOT = Path(__file__).parents[2]
COMMAND = "dmtjepa settings --markdown > docs/settings.md"


def test_the_page_is_that_of_the_schema():
    assert (ROOT / "docs" / "settings.md").read_text() == make_markdown(), f"run: {COMMAND}"
    assert COMMAND in make_markdown()


def test_the_command_prints_the_page():
    command = [sys.executable, "-m", "dmtjepa.config", "--markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == make_markdown()


def test_each_setting_has_a_row_that_says_whether_it_may_change():
    rows = [line.strip("| ").split(" | ") for line in make_markdown().splitlines() if line.startswith("| `")]
    assert {row[0].strip("`"): row[3] for row in rows} == {
        key: rule.value for key, rule in resume_rules(Config).items()
    }
    assert all(len(row) == 5 and row[4] for row in rows)


@pytest.mark.parametrize(
    ("annotation", "metadata", "text"),
    [
        (int, Field(ge=1, le=64).metadata, "integer, at least 1, at most 64"),
        (bool, (), "true or false"),
        (Literal["a", "b"], (), "`a`, `b`"),
        (str | None, (), "text or null"),
        (int | tuple[int, int], (), "integer or [first, second], each an integer"),
        (tuple[Annotated[float, Field(gt=0)], float], (), "[first, second], each a number, more than 0"),
        (tuple[int, ...], (), "list, each: integer"),
        (float | None, Field(gt=0, lt=2).metadata, "number, more than 0, less than 2 or null"),
    ],
)
def test_values_in_words(annotation, metadata, text):
    assert describe_values(annotation, metadata) == text
