"""Which steps are captured into CUDA graphs and which are replayed, and what the host does for them."""

import json
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

pytestmark = pytest.mark.slow
NUM_STEPS, MOST_GRAPHS, WARM_UP = 40, 3, 3


@pytest.fixture(scope="module")
def found(start_on):
    ended = start_on(sys.executable, "-m", "tests.fake_cuda.graphs", NUM_STEPS).end()
    assert ended.code == 0, ended.output
    return json.loads(ended.output.splitlines()[-1])


def test_the_first_step_of_a_shape_is_captured_and_further_ones_are_replayed(found):
    captured: list[list[int]] = []
    for number, row in enumerate(found["rows"]):
        measured = number % 5 == 4
        replayed = row["shape"] in captured and not measured
        new = not measured and row["shape"] not in captured and number >= WARM_UP and len(captured) < MOST_GRAPHS
        if new:
            captured.append(row["shape"])
        assert row["replays"] == replayed, number
        assert row["captures"] == new, number
        assert row["graphs"] == len(captured) <= MOST_GRAPHS
    shapes = {tuple(row["shape"]) for row in found["rows"]}
    assert len(captured) == MOST_GRAPHS < len(shapes)
    assert sum(row["replays"] for row in found["rows"]) >= 5


def test_a_replayed_step_is_few_launches_of_the_host_and_as_many_of_the_device(found):
    replayed = [row for row in found["rows"] if row["replays"]]
    eager = [row["launches"] for row in found["rows"][5:] if not row["replays"] and not row["captures"]]
    for row in replayed:
        assert row["launches"] <= 50
        assert row["waits"] == 0
        assert 0.9 * min(eager) <= row["replayed"] <= min(eager)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wait", "a call that a capture does not allow"),
        ("query", "a call that a capture does not allow"),
        ("fork", "a capture with a stream that was not joined"),
        ("wait of a thread", "a call that a capture does not allow"),
    ],
)
def test_what_a_capture_forbids_ends_the_run_with_advice(found, name, reason):
    assert "could not be captured into a CUDA graph" in found["faults"][name]
    assert reason in found["faults"][name]
    assert "set runtime.cuda_graphs=off" in found["faults"][name]


def test_other_threads_may_ask_for_their_events_during_a_capture(found):
    """As NCCL's watchdog does, which ends the process where it may not."""
    assert found["faults"]["query of a thread"] == ""


def test_the_addresses_of_the_gradients_lie_where_no_replay_writes(found):
    assert found["memory"]["overwritten_tables"] == 0


def test_graphs_share_memory_that_the_estimate_counts(found):
    # The allocator takes large memory in such pieces.
    segment = (40 if Version(version("torch")) >= Version("2.15") else 20) << 20
    assert 0 < found["memory"]["pool"] <= found["memory"]["estimate"] + segment
