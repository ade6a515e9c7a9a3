"""A few rounds of tests/kill_test.py, which takes any number."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_test.py"


@pytest.mark.slow
def test_killed_run_loses_nothing_that_was_saved(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--seed", "1", "--folder", str(tmp_path / "kills")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills of 2 processes" in done.stdout
