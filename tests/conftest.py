"""What all tests share.

Tests marked `gpu` are skipped without a CUDA device. Tests that use an expensive fixture are marked `slow`.
"""

import os
import signal
import threading
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: without a GPU, its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# nohup and background jobs of a script start programs that ignore these. A run respects it; tests must not inherit it.
if threading.current_thread() is threading.main_thread():
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)


# Fixtures that take more than a few seconds: a whole run, main.py as a process, a drawn image set.
EXPENSIVE_FIXTURES = {"plain", "start", "start_on", "cache"}


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` selects
def pytest_collection_modifyitems(items):
    for item in items:
        if EXPENSIVE_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    start_with_the_slow_files(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def start_with_the_slow_files(items):
    """Sort tests so that parallel processes end together.

    Tests on SLURM come first: they wait for minutes while others compute. Then come the folders, and in them the files,
    with the largest number of slow tests, then those with the largest number of tests.
    """
    slow, tests, slurm = Counter(), Counter(), set()
    for item in items:
        tests.update({item.path, item.path.parent})
        if item.get_closest_marker("slow"):
            slow.update({item.path, item.path.parent})
        if item.get_closest_marker("slurm"):
            slurm.add(item.path)

    def order(item):
        file, folder = item.path, item.path.parent
        return file not in slurm, -slow[folder], -tests[folder], str(folder), -slow[file], -tests[file], str(file)

    items.sort(key=order)
