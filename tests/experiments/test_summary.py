"""Tables and plots of results that are known."""

import json

import pytest

from experiments.__main__ import main
from experiments.summary import collect, format_table, read_results
from experiments.table import ROOT


def write_result(folder, variant, seed, trained, untrained, steps=100):
    report = {
        "knn": {name: {"5": 0.1, "20": share} for name, share in
                {"trained": trained, "untrained": untrained, "pixels": 0.4}.items()},
        "knn_layout": {"trained": {"5": 0.1, "20": 0.5}},
        "linear": {"trained": trained + 0.1, "untrained": untrained},
        "segmentation": {},
        "collapse": {"trained": {"effective_rank_centered": 12.0}},
    }  # fmt: skip
    metrics = [{"step": step, "targets/explained_variance": step / 100 + seed / 10} for step in (9, 19, 29)]
    result = {"variant": variant, "seed": seed, "steps": steps, "train_seconds": 90.0, "report": report}
    result["processor_seconds_per_step"] = 0.725 if variant == "a" else None  # that of a last start without steps
    result["metrics"] = [*metrics, {"step": 29, "eval/linear": 0.5}, {"step": 29, "targets/explained_variance": None}]
    path = folder / f"{variant}-seed{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path):
    write_result(tmp_path, "b", 1, 0.54, 0.31)
    write_result(tmp_path, "b", 0, 0.50, 0.30)
    write_result(tmp_path, "a", 0, 0.60, 0.30)
    return tmp_path


def test_a_row_holds_mean_and_standard_deviation_over_seeds(results):
    lines = format_table(read_results(results)).splitlines()
    names = "k-NN, k = 20 | with layout | linear | centred rank | explained"
    assert lines[0] == f"|  | seeds | steps | minutes | processor ms/step | {names} |"
    assert lines[2] == "| a | 1 | 100 | 2 | 725.0 | 60.0 | 50.0 | 70.0 | 12.0 | 29.0 |"
    assert lines[3] == "| b | 2 | 100 | 2 | - | 52.0 ± 2.8 | 50.0 ± 0.0 | 62.0 ± 2.8 | 12.0 ± 0.0 | 34.0 ± 7.1 |"
    assert lines[4].startswith("| untrained | 2 | - | - | - | 30.5 ± 0.7 | - |")
    assert lines[5] == "| pixels | 1 | - | - | - | 40.0 | 40.0 | - | - | - |"


def test_the_untrained_network_of_a_seed_counts_once(results):
    assert sorted(collect(read_results(results))["untrained"]["linear"]) == pytest.approx([30, 31])


@pytest.mark.slow
def test_plots_are_written(results, capsys):
    assert main(["plot", str(results)]) == 0
    assert main(["publish", str(results), "--out", str(results / "kept.json")]) == 0
    assert main(["plot", str(results / "kept.json")]) == 0
    for name in ("results.png", "curves.png", "kept-results.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_a_published_file_reads_like_the_folder_and_names_no_folder_of_this_machine(results, tmp_path, capsys):
    path = results / "a-seed0" / "result.json"
    result = json.loads(path.read_text())
    looks = [
        {"step": 49, "features/effective_rank": 3.0, "targets/explained_variance": 0.5},
        {"step": 49, "eval/seconds": 1},
    ]
    command = "/opt/python /home/someone/main.py 'data.root_path=/home/someone/photos'"
    result["metrics"] += looks
    result["starts"] = [{
        "step": 0, "commit": "abc", "command": command, "folder": "/home/someone", "python": "3.11", "device": "cpu",
        "cpus": 2, "packages": {"torch": "2.11"},
    }, {"step": 5, "commit": "abd"}]  # fmt: skip
    result["report"]["data"] = {"description": "/home/someone/photos/train and /home/someone/photos/val; 3/4 of them"}
    path.write_text(json.dumps(result))
    out = tmp_path / "kept" / "results.json"
    assert (
        main(["publish", str(results), "--out", str(out), "--note", "of a test", "--made-by", "run /tmp/x.yaml"]) == 0
    )
    document = json.loads(out.read_text())
    assert list(document) == ["command", "hardware", "versions", "note", "runs"]
    assert (document["command"], document["hardware"]) == (["run x.yaml"], "cpu, 2 CPUs")
    assert document["versions"] == {"python": "3.11", "torch": "2.11"}
    first = document["runs"][0]
    assert (first["variant"], first["metrics"]) == ("a", looks)
    assert first["starts"] == [{"step": 0, "commit": "abc"}, {"step": 5, "commit": "abd"}]
    assert first["report"]["data"]["description"] == "train and val; 3/4 of them"
    assert "/home" not in out.read_text()

    capsys.readouterr()
    assert main(["table", str(out)]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row == "| a | 1 | 100 | 2 | 725.0 | 60.0 | 50.0 | 70.0 | 12.0 | 50.0 |"
    assert main(["publish", str(results), "--out", str(out)]) == 1  # not overwritten
    assert "exists; choose another --out" in capsys.readouterr().err


def test_the_published_results_of_this_project_make_a_table(capsys):
    documents = {path: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    published = [path for path, document in documents.items() if {"versions", "note", "runs"} <= document.keys()]
    assert len(published) >= 3
    for path in published:
        assert main(["table", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "linear" in printed or "mIoU" in printed  # masks need no labels


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON"])
def test_another_file_is_refused(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert main(["table", str(tmp_path / "a.json")]) == 1
    assert "a.json is no file of python -m experiments publish" in capsys.readouterr().err


def test_a_folder_without_results_says_so(tmp_path, capsys):
    assert main(["table", str(tmp_path)]) == 1
    assert "holds no result yet" in capsys.readouterr().err


def test_missing_images_are_named_before_any_run_starts(tmp_path, capsys):
    table = next((ROOT / "experiments" / "tables").glob("*.yaml"))
    assert main(["run", str(table), "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 1
    assert "missing is no folder; nothing was started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
