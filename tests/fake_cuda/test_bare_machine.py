"""`benchmarks/carry.sh run` on a fake GPU where PyTorch, Triton and the carried wheels alone can be imported."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu_check
from tests.helpers.bare_machine import ROOT, copy_checkout, make_environment, pack_wheels

pytestmark = pytest.mark.slow

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def rehearse(start_on, tmp_path_factory):
    """rehearse(part) -> how the command of docs/performance.md ended, and the files in its archive, by name."""
    folder = tmp_path_factory.mktemp("bare")
    script = folder / "checkout" / "benchmarks" / "carry.sh"
    python = make_environment(folder / "environment")
    copy_checkout(folder / "checkout")
    listed = subprocess.check_output([ROOT / "benchmarks" / "carry.sh", "list", "--all"], text=True)
    pack_wheels(folder / "checkout" / "build" / "carry", listed.split())

    def run(part: int):
        archive = folder / f"part{part}.tar.gz"
        options = ("--rehearsal", "--part", part, "--out", folder / f"results{part}", "--archive", archive)
        # test_full_step.py and test_inductor.py compile.
        variables = {"PYTHON": str(python), "GIT_COMMIT": COMMIT, "TORCH_COMPILE_DISABLE": "1"}
        ended = start_on("bash", script, "run", *options, **variables).end()
        assert archive.exists(), ended.output
        assert archive.stat().st_size <= gpu_check.ARCHIVE_BYTES
        with tarfile.open(archive) as file:
            names = [member.name for member in file if member.isfile()]
            return ended, {name.partition("/")[2]: file.extractfile(name).read() for name in names}

    return run


@pytest.mark.parametrize("part", [1, 2, 3])
def test_part_runs_to_its_summary(rehearse, part):
    ended, files = rehearse(part)
    summary = json.loads(files["summary.json"])
    rows = {row["name"]: row for row in summary["steps"]}
    steps = gpu_check.choose(gpu_check.steps(Path("results"), None, None), None, part)
    assert list(rows) == [step.name for step in steps]
    assert summary["commit"] == COMMIT
    assert "tables.md" in files
    lines = [line for line in ended.output.splitlines() if line]
    assert lines[-1].startswith("archive: ")
    assert lines[-1].endswith(f"part{part}.tar.gz")  # nothing was left out
    for name, row in rows.items():
        log = files[f"{name}.log"].decode()
        assert row["return_code"] is not None, log  # it was not stopped
        assert "ModuleNotFoundError" not in log, log
        if "pytest" in row["command"]:
            assert row["return_code"] == 0, log
    documents = {name: json.loads(text) for name, text in files.items() if name.endswith(".json") and "-" in name}
    assert len(documents) == sum("pytest" not in row["command"] for row in rows.values())
    for name, document in documents.items():
        assert document["commit"] == COMMIT
        assert document["rows"] or name.endswith("profile.json")  # its rows are kernels, and none ran
        for row in document["rows"]:
            # Values are zero, so results count as wrong and are timed nevertheless.
            assert {"ms", "peak_bytes"} & row.keys() or row["kernel"] == "cudnn", row
