"""A few kills of tests/kill_test.py, which takes any number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEAVE_ONE = """
import os, signal, sys, time
from pathlib import Path
from tests.helpers.programs import Program

def leave_one():
    if os.fork() == 0:
        signal.pause()
    return 3

program = Program(leave_one, ["leave"], Path(sys.argv[1]))
assert program.wait(240)
assert program.code == 3, program.code
assert len(program.members()) == 1, program.members()
program.kill_all()
while program.members():
    time.sleep(0.01)
"""


def test_a_process_that_is_left_is_found(tmp_path):
    """By its session, after the program that started it has ended."""
    command = [sys.executable, "-c", LEAVE_ONE, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_programs_lose_nothing_and_leave_no_process(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.kill_test", "--kills", "3", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert sum(len(run["kills"]) for run in results["runs"]) == 3
    assert "3 kills of" in done.stdout
