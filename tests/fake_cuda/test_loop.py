"""Training on GPUs that are not there: everything on the host is real, and so are its failures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dmtjepa import checkpoint_format

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # each test starts a process that imports torch and trains


def test_no_step_between_two_logged_ones_waits_for_the_device(start_on):
    """The tests of that name that a GPU has, in all their variants; and the test of graphs, with losses of zero."""
    plugins = ("no:cacheprovider", "no:logging", "tests.helpers.no_machine_code")
    options = (*(f"-p{plugin}" for plugin in plugins), "-k", "waits_for_the_device or graphs_give_the_losses")
    ended = start_on(sys.executable, "-m", "pytest", HERE.parent / "training" / "test_gpu.py", *options).end()
    assert ended.code == 0, ended.output
    assert "13 passed" in ended.output


def test_main_trains_and_goes_on(main_py, settings):
    config = settings(**{"mask.pack": True, "optimization.epochs": 2})
    ended = main_py(config, "cuda:0", program=HERE / "compiled_main.py")
    assert ended.code == 0, ended.output
    assert "finished at step 16 of 16" in ended.output
    checkpoint_format.discard(Path(config.logging.folder, "checkpoints", "step-00000016"))
    ended = main_py(settings(**{"mask.pack": True, "optimization.epochs": 2, "runtime.compile": "off"}), "cuda:0")
    assert ended.code == 0, ended.output
    assert "resumed from" in ended.output
    assert "finished at step 16 of 16" in ended.output


def test_two_devices_resume_and_each_rank_stays_on_its_own(start_on):
    """A test that two GPUs have, with losses of zero."""
    options = ("-pno:cacheprovider", "-pno:logging", "-k", "resumes_from and two-sharded")
    test = HERE.parent / "training" / "test_gpu.py"
    ended = start_on(sys.executable, "-m", "pytest", test, *options, devices=2, TORCH_COMPILE_DISABLE="1").end()
    assert ended.code == 0, ended.output
    assert "1 passed" in ended.output
    check_contexts(ended, [0, 0, 1, 1])


def test_each_of_four_ranks_stays_on_its_device(main_py, settings):
    changes = {"runtime.compile": "off", "data.batch_size": 8, "optimization.epochs": 1, "runtime.shard_size": 2}
    ended = main_py(settings(**changes), *(f"cuda:{index}" for index in range(4)), devices=4)
    assert ended.code == 0, ended.output
    check_contexts(ended, [0, 1, 2, 3])


def check_contexts(ended, expected):
    """Each process has made one context, on these devices."""
    processes, indices = zip(*ended.contexts, strict=True)
    assert sorted(indices) == expected
    assert len(set(processes)) == len(processes)
