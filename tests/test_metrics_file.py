"""`metrics.jsonl`: what is written is read again, whatever a killed run has left."""

import math

from dmtjepa.metrics_file import MetricsFile, read_metrics


def write_rows(path, first_step, last_step, value):
    file = MetricsFile(path, first_step=first_step)
    for step in range(first_step, last_step):
        file.write(step, {"loss": value})
    file.close()


def test_a_row_is_one_line_of_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, first_step=0)
    file.write(9, {"eval/linear": 0.5, "best": "eval/linear", "count": 3})
    file.flush()
    assert path.read_text() == '{"step": 9, "eval/linear": 0.5, "best": "eval/linear", "count": 3}\n'
    file.write(9, {"loss": math.nan, "norm": math.inf})  # JSON has no such numbers
    file.close()
    assert read_metrics(path)[1] == {"step": 9, "loss": None, "norm": None}


def test_a_resumed_run_replaces_the_rows_of_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 0, 6, 0.5)
    write_rows(path, 4, 8, 0.25)
    assert read_metrics(path) == [{"step": step, "loss": 0.5 if step < 4 else 0.25} for step in range(8)]
    write_rows(path, 0, 1, 1.0)  # a run that starts anew
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}]


def test_lines_that_a_killed_run_has_left_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": "1"}\n{"step": true}\n{"step": 2, "lo'
    )
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    write_rows(path, 2, 3, 0.5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 0.5}\n'
