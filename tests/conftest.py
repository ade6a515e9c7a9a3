"""What all tests share.

Tests marked `gpu` are skipped without a CUDA device. Tests that use an expensive fixture are marked `slow`.
"""

import os
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: without a GPU, its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
    """Sort tests by the number of slow ones in their folder, then in their file: parallel processes end together."""
    counts = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            counts.update({item.path, item.path.parent})
    items.sort(key=lambda item: (-counts[item.path.parent], str(item.path.parent), -counts[item.path], str(item.path)))
