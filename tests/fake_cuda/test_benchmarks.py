"""The programs that benchmarks/gpu_check.py runs, and step.host, run to their end on a fake GPU."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

TINY = ("--set", "data.crop_size=96", "mask.min_keep=2", "meta.pred_depth=1", "meta.pred_emb_dim=16")
PROGRAMS = {
    "step.host": ("--workloads", "vit_nano:2", *TINY, "--providers", "project:eager", "--warmup", "2", "--steps", "3"),
    "step.attention": ("--lengths", "48", "--head-sizes", "24", "--batch", "2"),
    "step.target_head": ("--workloads", "vit_base:2", "--repeats", "3"),
    "step.speed": ("--workloads", "vit_nano:2", *TINY, "--providers", "reference", "project:eager", "--steps", "3"),
    "operators.speed": ("--workloads", "vit_base:2"),
    "step.profile": ("--workload", "vit_nano:2", *TINY, "--provider", "project:eager", "--steps", "1"),
    "step.memory": ("--workloads", "vit_nano:2", "vit_nano:4", *TINY, "--providers", "project:eager"),
    "data.data_wait": (
        "--workload", "vit_nano:2", *TINY, "runtime.compile=off", "--loader", "pil", "--workers", "0",
        "--steps", "20", "--warmup", "10",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(start_on, image_folder, tmp_path_factory):
    """The folder of each program's results, and the fault that ended it, or None; all run in one process."""
    folder = tmp_path_factory.mktemp("results")
    programs = {name: [*options, "--out", str(folder / name)] for name, options in PROGRAMS.items()}
    programs["data.data_wait"].insert(0, str(image_folder))
    ended = start_on(sys.executable, Path(__file__).with_name("run_benchmarks.py"), json.dumps(programs)).end()
    assert ended.code == 0, ended.output
    faults = json.loads(ended.output.splitlines()[-1])
    return {name: (folder / name, faults[name]) for name in PROGRAMS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_ends_well(results, name):
    folder, fault = results[name]
    assert fault is None, fault
    (path,) = folder.glob("fake-h100-*.json")
    # The rows of a profile are its kernels, and none ran.
    assert json.loads(path.read_text())["rows"] or name == "step.profile"


def test_host_is_measured(results):
    folder, _ = results["step.host"]
    (path,) = folder.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert 0 < row["ms_least"] <= row["ms"]
    assert row["launches"] > 300
    assert row["waits"] == 0
    assert row["graphs"] == 0
