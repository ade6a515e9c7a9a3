"""A step of ViT-B/16 at its official batch, compiled: its memory, its graphs, what it makes the host do."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(start_on):
    # Compiled in the process itself: others that help it would have to import everything first.
    variables = {"TORCHINDUCTOR_PERSISTENT_REDUCTIONS": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ended = start_on(sys.executable, HERE / "full_step.py", **variables).end()
    assert ended.code == 0, ended.output
    return json.loads(ended.output.splitlines()[-1])


def test_memory_lies_a_little_below_its_estimate(found):
    assert found["peak"] <= found["estimate"] <= 1.5 * found["peak"]


def test_masks_of_other_shapes_compile_nothing_again(found):
    assert found["context_sizes"] >= 5
    # Blocks of the teacher, the encoder, the predictor and its last one; both halves of the head.
    assert found["graphs"] == 6


def test_host_enqueues_a_step_without_waiting(found):
    assert found["waits"] == 0
    assert 500 < found["launches"] < 1500
