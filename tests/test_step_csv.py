"""The CSV of a rank: what is written is read again, whatever a killed run has left."""

import os

import pytest

from dmtjepa.errors import UserError
from dmtjepa.step_csv import COLUMNS, CsvError, StepCsv, read_losses

HEADER = "epoch,itr,loss,mask-A,mask-B,time (ms)\n"


def test_losses_are_read_from_the_official_csv(tmp_path):
    path = tmp_path / "jepa_r0.csv"
    # As after a kill: a line cut short, then a second header.
    path.write_text(
        HEADER + "1,0,0.50000,50,30,9\n1,1,0.40000,50,30,9\n2,0,0.3\n2,1,\n" + HEADER + "2,1,0.20000,50,30,9\n"
    )
    curve = read_losses(path)
    assert curve.epoch.tolist() == [0, 0.5, 1, 1.5]
    assert curve.loss.tolist() == [0.5, 0.4, 0.3, 0.2]
    path.write_text(HEADER)
    assert len(read_losses(path).loss) == 0
    path.write_text("step,value\n1,2\n")
    with pytest.raises(CsvError, match="no column epoch, itr, loss"):
        read_losses(path)


def test_a_file_that_cannot_be_read_is_an_error_for_users(tmp_path):
    assert issubclass(CsvError, UserError)
    with pytest.raises(CsvError, match=r"jepa_r0\.csv cannot be read"):
        read_losses(tmp_path / "jepa_r0.csv")
    (tmp_path / "long.csv").write_text(HEADER + "1" * 200_000 + ",0,0.5,50,30,9\n")
    with pytest.raises(CsvError, match=r"long\.csv cannot be read"):
        read_losses(tmp_path / "long.csv")


def test_rows_that_a_power_failure_has_garbled_are_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER.encode() + b"1,0,0.5,50,30,9\n\xff\xfe,\x00\n1,1,0.4,50,30,9\n" + bytes(300))
    assert read_losses(path).loss.tolist() == [0.5, 0.4]
    write_steps(path, 2, 3, 0.3)
    assert read_losses(path).loss.tolist() == [0.5, 0.4, 0.3]


def write_steps(path, first_step, last_step, loss):
    rows = StepCsv(path, first_step=first_step, steps_per_epoch=4)
    for step in range(first_step, last_step):
        rows.write(step // 4, step % 4, loss, 20, 12, 0.0085)
    rows.close()


def test_rows_are_those_of_the_official_code(tmp_path):
    assert ",".join(COLUMNS) == HEADER.strip()
    write_steps(tmp_path / "a.csv", 3, 5, 1 / 3)
    assert (tmp_path / "a.csv").read_text() == (
        HEADER + "1,3,0.333333333,20.00000,12.00000,8\n2,0,0.333333333,20.00000,12.00000,8\n"
    )


def test_a_resumed_run_keeps_the_rows_before_it(tmp_path):
    path = tmp_path / "a.csv"
    write_steps(path, 0, 7, 0.5)
    with path.open("a") as file:
        file.write("2,3,0.")  # killed in the middle of a row
    write_steps(path, 5, 8, 0.25)
    assert read_losses(path).loss.tolist() == [0.5] * 5 + [0.25] * 3
    write_steps(path, 0, 2, 1.0)
    assert read_losses(path).loss.tolist() == [1.0, 1.0]


def test_a_start_that_is_killed_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_steps(path, 0, 7, 0.5)
    before = path.read_text()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        StepCsv(path, first_step=5, steps_per_epoch=4)
    assert path.read_text() == before
