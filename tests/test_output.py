"""A process goes on without its standard output and standard error."""

import subprocess
import sys
from pathlib import Path

import pytest

import main_distributed
from dmtjepa.cli import check, evaluate, settings, shards, weights
from tests.helpers.streams import BrokenPipe

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"

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


@pytest.mark.parametrize(
    ("main", "arguments", "code"),
    [
        (main_distributed.main, ["--fname", str(QUICKSTART), "--folder", "logs", "--dry-run"], 0),
        (main_distributed.main, ["--fname", "nowhere.yaml", "--folder", "logs"], 1),
        (evaluate.main, ["nowhere"], 1),
        (weights.main, ["verify", "nowhere"], 1),
        (shards.main, ["nowhere", "out"], 1),
        (check.main, ["nowhere"], 2),
        (settings.main, [], 0),
    ],
)
def test_no_program_needs_its_output(monkeypatch, tmp_path, main, arguments, code):
    """The exit code is that of the work, not of the message about it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", BrokenPipe())
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    assert main(arguments) == code


@pytest.mark.parametrize("rank", [0, 3])
def test_messages_of_a_rank(rank):
    """Above a progress bar, whose line is not continued by a message. Ranks other than 0 only warn, with their rank."""
    program = f"""if True:
        import logging, sys
        from tqdm import tqdm
        from dmtjepa.output import configure_logging
        configure_logging({rank})
        configure_logging({rank})  # a second call adds nothing
        with tqdm(total=2, mininterval=0) as bar:
            bar.update()
            logging.getLogger("dmtjepa.part").info("told")
            logging.getLogger("dmtjepa.part").warning("warned")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    assert lines.count("INFO dmtjepa.part: told") == (rank == 0)
    assert lines.count("WARNING dmtjepa.part: warned" if rank == 0 else "rank 3: WARNING dmtjepa.part: warned") == 1


def test_messages_of_a_library_that_writes_them_itself_come_once(tmp_path):
    """As those of huggingface_hub. A file of its own is no reason to be silent."""
    program = """if True:
        import logging, sys
        from dmtjepa.output import configure_logging
        configure_logging()
        logging.getLogger("library").addHandler(logging.StreamHandler())
        logging.getLogger("library.part").warning("retrying")
        logging.getLogger("other").addHandler(logging.FileHandler(sys.argv[1]))
        logging.getLogger("other").warning("written")
    """
    arguments = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.stderr.splitlines() == ["retrying", "WARNING other: written"]
