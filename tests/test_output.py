"""A process goes on without its standard output and standard error."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging, os, sys, time
from dmtjepa.output import protect_output
protect_output()
logging.basicConfig(level=logging.INFO)
file = open(sys.argv[1], "w")
for line in range(3):
    print("standard output", flush=True)
    print("standard error", file=sys.stderr, flush=True)
    logging.warning("logged")
    os.system("echo by another process >&2")
sys.stderr.isatty()
print("the end", file=file)
"""


@pytest.mark.parametrize("how", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"])
def test_output_that_fails_ends_nothing(tmp_path, how):
    path = tmp_path / "file"
    command = f"set -o pipefail; exec 9<&0; '{sys.executable}' -c \"$1\" '{path}' {how}"
    done = subprocess.run(["bash", "-c", command, "bash", PROGRAM], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == "the end\n"
