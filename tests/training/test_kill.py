"""A few kills of tests/kill_test.py, which takes any number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_programs_lose_nothing_and_leave_no_process(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.kill_test", "--kills", "6", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert sum(len(run["kills"]) for run in results["runs"]) == 6
    assert "6 kills of" in done.stdout
