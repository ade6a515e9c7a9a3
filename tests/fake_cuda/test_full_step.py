"""A step of ViT-B/16 at its official batch, compiled: its memory, its graphs, what it makes the host do."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.workloads import parse_workload
from tests.helpers.extreme_masks import context_bounds

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compile_steps(start_on):
    """compile_steps("program.py") -> what it printed last."""

    def run(program: str) -> dict:
        # Compiled in the process itself: others that help it would have to import everything first.
        variables = {"TORCHINDUCTOR_PERSISTENT_REDUCTIONS": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        ended = start_on(sys.executable, HERE / program, **variables).end()
        assert ended.code == 0, ended.output
        return json.loads(ended.output.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def found(compile_steps):
    return compile_steps("full_step.py")


def test_memory_lies_a_little_below_its_estimate(found):
    assert found["peak"] <= found["estimate"] <= 1.5 * found["peak"]


def test_no_masks_that_can_be_drawn_compile_anything_again(found):
    assert found["context_sizes"] >= 5  # and the smallest and the largest
    # Blocks of the teacher, the encoder, the predictor and its last one; both halves of the head.
    assert found["graphs"] == 6


def test_nor_for_vit_huge_and_cifar10(compile_steps):
    # With the smallest and the largest masks alone: a step of ViT-B has those between.
    assert compile_steps("extreme_steps.py") == {
        "H/14": {"first": 6, "others": 0},
        "CIFAR-10": {"first": 6, "others": 0},
    }


@pytest.mark.parametrize(("workload", "fewest", "most"), [("vit_base:256", 11, 139), ("vit_huge:128", 11, 190)])
def test_bounds_of_contexts_hold_those_that_are_drawn(workload, fewest, most):
    workload = parse_workload(workload)
    assert context_bounds(workload) == (fewest, most)
    sizes = {int(workload.mask_shapes(step).context) for step in range(8)}
    assert fewest <= min(sizes)
    assert max(sizes) <= most


def test_host_enqueues_a_step_without_waiting(found):
    assert found["waits"] == 0
    assert 500 < found["launches"] < 1500
