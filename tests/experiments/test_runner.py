"""The runner: killed and continued, shared by processes, and its failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmtjepa.run_folder import RunFolder, RunFolderError
from experiments import runner
from experiments.runner import RunFailed, claimed, compute
from experiments.summary import read_results
from experiments.table import Table, TableError
from tests.helpers.programs import list_processes
from tests.helpers.run_folders import write_images

ROOT = Path(__file__).parents[2]

TABLE = """
base: configs/quickstart.yaml
settings: [data.dataset=folder, data.crop_size=32, data.batch_size=8, data.num_workers=0, data.loader=pil,
  mask.min_keep=0, optimization.epochs=8, runtime.log_every=1, runtime.save_every_epochs=1]
variants:
  patch: [patch.query=patch]
seeds: [3]
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "colors"
    write_images(folder / "train", 8, seed=0)
    write_images(folder / "val", 4, seed=1)
    return folder


def wait_until(condition, process):
    deadline = time.monotonic() + 900  # only ends a hang
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_table_continues_where_it_was(images, tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE)
    command = [sys.executable, "-m", "experiments", "run", "table.yaml", "--data", images, "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "out" / "patch-seed3"
    checkpoints = RunFolder(folder, "jepa").checkpoints

    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        wait_until(lambda: any(checkpoints.glob("step-*")), process)
    finally:
        children = [row.pid for row in list_processes() if row.parent == process.pid]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert children
    deadline = time.monotonic() + 300
    while {row.pid for row in list_processes()} & set(children):  # a run does not go on without its runner
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (folder / "result.json").exists()

    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=1800)
    result = json.loads((folder / "result.json").read_text())
    assert (result["variant"], result["seed"], result["steps"]) == ("patch", 3, 24)
    assert len(result["starts"]) == 2
    assert result["starts"][1]["step"] > 0
    assert result["processor_seconds_per_step"] > 0
    assert set(result["report"]["knn"]) >= {"trained", "untrained", "pixels"}


@pytest.fixture
def table():
    settings = ["data.dataset=folder", "data.crop_size=32", "mask.min_keep=0"]
    variants = {"one": [], "two": ["patch.query=patch"]}
    return Table(base="configs/quickstart.yaml", settings=settings, variants=variants)


@pytest.fixture
def computed(monkeypatch):
    """The names of runs that were computed; the run `two` fails while `computed.fails` is true."""

    class Computed(list):
        fails = False

    names = Computed()

    def pretend(run, images, folder, device):
        if run.variant == "two" and names.fails:
            raise RunFailed("exit code 1: out of luck")
        names.append(run.name)
        (folder / "result.json").write_text(
            json.dumps({"base": run.base, "settings": list(run.settings), "images": images.name})
        )

    monkeypatch.setattr(runner, "train_and_measure", pretend)
    return names


def test_a_run_that_failed_is_tried_again(table, computed, tmp_path, capsys):
    computed.fails = True
    assert compute(table, tmp_path, tmp_path) == ["two-seed0"]
    assert "out of luck" in capsys.readouterr().out
    computed.fails = False
    assert compute(table, tmp_path, tmp_path) == []
    assert computed == ["one-seed0", "two-seed0"]


@pytest.fixture
def finished(table, computed, images, tmp_path):
    """A folder with a finished and a started run."""
    compute(table, images, tmp_path / "out")
    for run in table.runs():
        folder = RunFolder.from_config(run.config(images, tmp_path / "out" / run.name))
        folder.config_file.write_text(run.config(images, folder.path).to_yaml())
        folder.latest_export.touch()
    (tmp_path / "out" / "two-seed0" / "result.json").unlink()
    return tmp_path / "out"


def test_a_table_refuses_runs_on_other_images(table, computed, finished, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(TableError, match=r"one-seed0 holds a result on the images colors, not other"):
        compute(table, other, finished)
    compute(table, images, finished)
    assert computed == ["one-seed0", "two-seed0", "two-seed0"]


def test_a_table_refuses_runs_of_an_edited_base_before_it_computes(table, computed, finished, images, monkeypatch):
    """Finished runs would stand beside others in one table, and started ones would fail one by one."""
    before = list(computed)
    for name in ("one-seed0", "two-seed0"):
        path = finished / name / "config.yaml"
        earlier = path.read_text()
        path.write_text(earlier.replace("lr: 0.0015", "lr: 0.5"))
        assert path.read_text() != earlier
        with pytest.raises(RunFolderError, match=rf"{name} holds a run with other settings[\s\S]*optimization.lr: 0.5"):
            compute(table, images, finished)
        path.write_text(earlier)
    assert computed == before


def test_what_cannot_be_written_or_read_is_named(table, computed, images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be written to"):
        compute(table, images, tmp_path / "file")
    (tmp_path / "out" / "one-seed0").mkdir(parents=True)
    (tmp_path / "out" / "one-seed0" / "result.json").write_text("{")
    with pytest.raises(TableError, match=r"result.json cannot be read"):
        compute(table, images, tmp_path / "out")
    with pytest.raises(TableError, match=r"result.json cannot be read"):
        read_results(tmp_path / "out")


def test_a_run_that_another_process_holds_is_left_to_it(table, computed, tmp_path):
    with claimed(tmp_path / "one-seed0") as mine:
        assert mine
        compute(table, tmp_path, tmp_path)
    assert computed == ["two-seed0"]


def test_a_result_of_other_settings_is_refused(table, computed, tmp_path):
    compute(table, tmp_path, tmp_path)
    changed = table.model_copy(update={"settings": [*table.settings, "optimization.lr=1e-4"]})
    with pytest.raises(TableError, match="holds the result of other settings"):
        compute(changed, tmp_path, tmp_path)


def test_a_program_takes_processor_time_not_the_time_of_others(tmp_path):
    computes = "import time\nwhile time.process_time() < 1: pass"
    assert runner.call([sys.executable, "-c", computes], tmp_path / "x.log") >= 1
    assert runner.call([sys.executable, "-c", "import time; time.sleep(2)"], tmp_path / "x.log") < 1.9


def test_a_program_that_fails_is_quoted(tmp_path):
    command = [sys.executable, "-c", "import sys; print('first'); sys.exit('no such luck')"]
    with pytest.raises(RunFailed, match=r"exit code 1: no such luck \(see .*x.log\)"):
        runner.call(command, tmp_path / "x.log")
