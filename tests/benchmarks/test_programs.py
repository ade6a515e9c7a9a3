"""The other programs run from end to end on a tiny model, and their arithmetic is right."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import goals, gpu_check, machine, tables
from benchmarks.operators import speed as operators_speed
from benchmarks.operators.cases import Case
from benchmarks.step import host, memory, profile, runs, scaling
from benchmarks.workloads import parse_workload

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_beside_its_estimate(run_program, tiny):
    document, printed = run_program(
        memory, "memory", "--workloads", "vit_nano:2", "vit_nano:4", "--set", *tiny,
        "--providers", "project", "reference",
    )  # fmt: skip
    rows = document["rows"]
    assert [(row["provider"].split()[0], row["batch"]) for row in rows] == [
        ("project", 2), ("reference", 2), ("project", 4), ("reference", 4),
    ]  # fmt: skip
    for row in rows:
        assert row["peak_bytes"] == row["held_bytes"] + row["transient_bytes"]
    small, large = rows[0], rows[2]
    assert small["held_bytes"] == large["held_bytes"]
    assert small["transient_bytes"] < large["transient_bytes"]
    assert small["estimate_error"] == pytest.approx(small["estimate_bytes"] / small["peak_bytes"] - 1)
    assert "estimate" in printed


def test_the_time_of_the_host_needs_a_gpu_or_fake_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, code in (["--help"], 0), ([], 2):
        monkeypatch.setattr(sys, "argv", ["host", *arguments])
        with pytest.raises(SystemExit) as ended:
            host.main()
        assert ended.value.code == code
        assert "python -m tools.fake_cuda python -m benchmarks.step.host" in "".join(capsys.readouterr())


def test_peak_memory_counts_what_a_call_holds():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        return second, third

    assert machine.peak_memory(call, "cpu") == 3000


def test_a_gpu_starts_a_timed_call_when_all_of_it_is_enqueued(monkeypatch):
    """Otherwise gaps between the kernels of a call are counted."""
    calls, zeros, clock = [], torch.zeros, itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch, "zeros", lambda count, dtype, device: zeros(64, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", calls.append)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: 1e-3 * next(clock)))
    assert machine._gpu_milliseconds(lambda: calls.append("call"), most=10) == 3.0
    assert calls[:3] == ["call"] * 3  # a millisecond each for the host
    assert calls[3:7] == [pytest.approx(2e-3 * machine.CLOCK_RATE), "event", "call", "event"]


def test_what_differs_is_timed_on_request_alone_and_meets_no_goal(monkeypatch, tmp_path):
    monkeypatch.setattr(operators_speed, "milliseconds", lambda function, device: 2.0)
    monkeypatch.setattr(operators_speed, "copy_bandwidth", lambda device: 1.0)
    x = torch.ones(2)
    case = Case("gather_tokens", (x,), torch.neg, torch.neg, torch.neg, torch.clone, unique_bytes=8, limit=1e-5)
    refused = operators_speed.measure(case, "triton", x, "cpu")
    assert "ms" not in refused
    assert "not timed" in refused["problem"]
    timed = operators_speed.measure(case, "triton", x, "cpu", time_anyway=True)
    assert (timed["ms"], timed["correct"]) == (2.0, False)
    assert "timed anyway" in timed["problem"]
    for correct in (False, True):
        row = {**timed, "workload": "w", "speed_vs": {}, "correct": correct}
        (tmp_path / "operators.json").write_text(json.dumps({"commit": "a", "rows": [row]}))
        assert len(goals.goals(tmp_path, "a")) == correct


@pytest.mark.slow
def test_operators_in_one_table(run_program, tiny, monkeypatch):
    monkeypatch.setattr(operators_speed, "milliseconds", lambda function, device: 2.0)
    machine.copy_bandwidth.cache_clear()

    document, printed = run_program(operators_speed, "operators", "--workloads", "vit_nano:2", "--set", *tiny)
    machine.copy_bandwidth.cache_clear()
    operators = {row["operator"].split()[0] for row in document["rows"]}
    assert operators == {
        "gather_tokens", "embed_patches", "select_neighbors", "aggregate_neighbors", "pool_neighbors",
        "indexed_smooth_l1", "update_weights",
    }  # fmt: skip
    for row in document["rows"]:
        assert row["correct"]
        assert row["gb_per_s"] == pytest.approx(row["unique_bytes"] / 2e6)
        assert row["operator"] in printed


@pytest.mark.slow
def test_profile_names_operators(run_program, tmp_path, tiny):
    document, printed = run_program(
        profile, "profile", "--workload", "vit_nano:2", "--set", *tiny, "--steps", "1", "--threads", "1"
    )
    rows = {row["operator"]: row for row in document["rows"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["aten::mm"]["gflop"] > 0
    assert rows["aten::mm"]["roofline"] > 0
    assert "aten::mm" in printed
    executed = sum(row["gflop"] or 0.0 for row in rows.values())  # each product once, whoever called it
    assert executed == pytest.approx(parse_workload("vit_nano:2", tiny).flops(runs.CHECKED_STEPS) / 1e9, rel=0.1)
    assert list(tmp_path.glob("*-trace.json.gz"))


@pytest.mark.parametrize("result", [[], [[3, 8]]])  # as an argument, in compiled code
def test_flops_and_bytes_of_a_product(result):
    shapes, types = (
        [[8], [3, 4], [4, 8], [], [], *result],
        ["float", "float", "float", "", "", *["float" for _ in result]],
    )
    assert profile.flops("aten::addmm", shapes) == 2 * 3 * 4 * 8
    assert profile.num_bytes("aten::addmm", shapes, types) == 4 * (8 + 3 * 4 + 4 * 8 + 3 * 8)
    shapes, types = [[5, 3, 4], [5, 4, 8], *([5, *shape] for shape in result)], ["c10::BFloat16"] * (2 + len(result))
    assert profile.flops("aten::bmm", shapes) == 5 * 2 * 3 * 4 * 8
    assert profile.num_bytes("aten::bmm", shapes, types) == 5 * 2 * (3 * 4 + 4 * 8 + 3 * 8)
    shapes, types = [[2, 3, 4], [8, 4], [8], [], [], []], ["float", "float", "float", "", "", ""]
    assert profile.flops("mkldnn::_linear_pointwise", shapes) == 2 * 2 * 3 * 4 * 8
    assert profile.num_bytes("mkldnn::_linear_pointwise", shapes, types) == 4 * (6 * 4 + 8 * 4 + 8 + 6 * 8)


def test_flops_of_attention():
    packed, rows, lse = [11, 2, 8], [3, 7, 2, 8], [3, 2, 7]
    forward = [rows, rows, rows, [], [], [], [], [], [], []]
    assert profile.flops("aten::_flash_attention_forward", forward) == 4 * 3 * 2 * 7 * 7 * 8
    backward = [rows, rows, rows, rows, rows, lse, [], [], [], [], [], [], [], []]
    assert profile.flops("aten::_flash_attention_backward", backward) == 10 * 3 * 2 * 7 * 7 * 8
    assert profile.flops("aten::_flash_attention_forward", [packed] * 3) is None
    for wrapper in ("xformers_flash::flash_bwd", "aten::_scaled_dot_product_flash_attention"):
        assert profile.flops(wrapper, backward) is None


def test_bytes_of_a_copy():
    assert profile.flops("aten::copy_", [[5], [5], []]) is None
    assert profile.num_bytes("aten::copy_", [[5], [5], []], ["float", "c10::BFloat16", ""]) == 20 + 10 + 20


@pytest.mark.slow
def test_two_processes(tmp_path, tiny):
    command = [sys.executable, "-m", "benchmarks.step.scaling", "--processes", "2", "--workload", "vit_nano:2"]
    done = subprocess.run(
        [*command, "--scaling", "strong", "--set", *tiny, "--steps", "2", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = scaling.collect(tmp_path)
    assert (row["processes"], row["batch"], row["global_batch"]) == (2, 2, 4)
    assert row["images_per_s"] == pytest.approx(4e3 / row["ms"])
    assert 0 < row["waiting"] < 1
    assert "efficiency" in done.stdout


@pytest.mark.slow
def test_efficiency_against_the_smallest_world(tmp_path):
    for processes, images_per_s in ((8, 5600.0), (1, 1000.0)):
        row = {"model": "vit_huge", "provider": "project", "scaling": "weak", "batch": 128}
        row |= {"processes": processes, "images_per_s": images_per_s}
        document = {"hardware": "NVIDIA H100 80GB HBM3", "rows": [row]}
        (tmp_path / f"h100-scaling-{processes}.json").write_text(json.dumps(document))
    one, eight = scaling.collect(tmp_path)
    assert (one["efficiency"], eight["efficiency"]) == (1, pytest.approx(0.7))
    assert one["predicted"] > eight["predicted"] > 0.7  # the model's: 8 GPUs of one node lose little


def test_results_are_saved_without_a_plot_where_matplotlib_is_not_there(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # to import it is a ModuleNotFoundError
    tables.save(tmp_path, "step", "cpu", [{"ms": 1.0}], plot=lambda axes, rows: None)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    printed = capsys.readouterr()
    assert "no plot" in printed.out
    assert "Traceback" not in printed.err  # one for each save would hide the results in a step's last lines


def test_union_of_spans():
    assert scaling.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4


def test_goals_of_the_step(tmp_path):
    shared = {"workload": "ViT-huge/14 B=128", "batch": 128, "speed_vs_reference": 9.0, "memory_vs_reference": 0.1}
    rows = [
        shared | {"provider": "official bfloat16", "mfu": 0.2, "images_per_s": 300.0},
        shared | {"provider": "project bfloat16 compiled", "mfu": 0.5, "images_per_s": 630.0}
        | {"speed_vs_official": 2.1, "memory_vs_official": 0.6},
        shared | {"provider": "project bfloat16 compiled fp8", "mfu": 0.53, "images_per_s": 670.0},
    ]  # fmt: skip
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "h200-step.json").write_text(json.dumps({"commit": "a", "rows": rows}))
    (tmp_path / "h200-memory.json").write_text(json.dumps({"commit": "b", "rows": [rows[1] | {"mfu": 0.1}]}))
    assert goals.goals(tmp_path, "a") == {
        "ViT-huge/14 B=128: float8 teacher at least 10% faster (+6%)": False,
        "ViT-huge/14 B=128: at least 2.0x the official step (2.10x)": True,
        "ViT-huge/14 B=128: at most 0.5x the memory of the official step (0.60x)": False,
        "ViT-huge/14 B=128: MFU of at least 48% (50.0%)": True,
    }


@pytest.fixture
def gpu_check_on_a_cpu(monkeypatch, tmp_path, capsys):
    """gpu_check as a program, its steps replaced: run(steps, *options) -> (exit code, summary, what it printed)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(gpu_check, "environment", lambda device: {"commit": "a"})

    def run(steps, *options):
        monkeypatch.setattr(gpu_check, "steps", lambda *arguments, num_gpus: steps)
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *options])
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        (path,) = tmp_path.glob("nvidia-test-*/summary.json")
        return end.value.code, json.loads(path.read_text()), capsys.readouterr().out

    return run


def step(name, text, seconds=60.0):
    return gpu_check.Step(name, (sys.executable, "-c", text), seconds)


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_failure_and_says_what_it_had_no_time_for(gpu_check_on_a_cpu):
    steps = [step("bad", "import sys; print('why'); sys.exit(3)"), step("slow", "import time; time.sleep(60)", 6.0)]
    code, summary, printed = gpu_check_on_a_cpu([*steps, step("good", "print('table')")])
    assert code == 1
    assert [row["return_code"] for row in summary["steps"]] == [3, None, 0]
    for words in ("why", "table", "--only slow"):
        assert words in printed
    code, summary, _ = gpu_check_on_a_cpu([step("slow", ""), step("good", "")], "--only", "slow")
    assert code == 0
    assert [(row["name"], row["return_code"]) for row in summary["steps"]] == [("bad", 3), ("good", 0), ("slow", 0)]


@pytest.mark.slow
def test_gpu_check_ends_a_minute_before_its_limit_and_says_what_is_left(gpu_check_on_a_cpu):
    steps = [step("first", "import time; time.sleep(600)", 600.0), step("second", "print('never')", 600.0)]
    code, summary, printed = gpu_check_on_a_cpu(steps, "--seconds", str(gpu_check.MARGIN + 7))
    assert code == 0
    first, second = summary["steps"]
    assert [first["return_code"], second["return_code"]] == [None, None]
    assert 0 < first["seconds"] < gpu_check.MARGIN  # not the 600 that it may take itself
    assert second["seconds"] == 0
    assert printed.rstrip().endswith("--only first second")


@pytest.mark.slow
def test_gpu_check_stops_what_a_stopped_step_has_started(tmp_path):
    """It would use the GPU beside the next step."""
    script = f"sleep 600 & echo $! > {tmp_path / 'process'}; wait"
    row = gpu_check.run(gpu_check.Step("outer", ("bash", "-c", script), 7.0), tmp_path, 60.0)
    assert row["return_code"] is None
    state = Path(f"/proc/{(tmp_path / 'process').read_text().strip()}/stat")
    for _ in range(100):  # a process that is killed may still have to be scheduled
        if gone := not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX":
            break
        time.sleep(0.1)
    assert gone


def test_what_matters_most_has_time_in_each_part(tmp_path):
    """The limits of these steps add up to the time of a call; the steps after them have what is left."""
    sure = {
        1: ["operator-tests", "graphs-tests", "attention", "profile", "step"],
        2: ["base", "large", "profile-base", "small", "host-small"],
        3: ["operators", "targets", "memory", "training-tests", "other-tests"],
    }
    most = gpu_check.TIME_LIMIT - gpu_check.MARGIN
    found = gpu_check.steps(tmp_path, tmp_path, tmp_path)
    for part, names in sure.items():
        chosen = gpu_check.choose(found, None, part)
        assert [step.name for step in chosen[: len(names)]] == names
        assert sum(step.seconds for step in chosen[: len(names)]) <= most
    assert all(step.seconds <= most for step in found)


@pytest.mark.slow
def test_several_gpus_have_steps_of_their_own(tmp_path):
    one, eight = (gpu_check.steps(tmp_path, None, None, num_gpus=count) for count in (1, 8))
    names = [step.name for step in one]
    added = {step.name: step.command for step in eight if step.name not in names}
    assert list(added) == ["several-gpus-tests", "scaling"]
    assert [step for step in eight if step.name in names] == one
    assert added["scaling"][-3:] == ("--processes", "1", "8")
    collect = (*added["several-gpus-tests"], "--collect-only")
    collected = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout
    assert collected.count("[two-sharded") == collected.count("[two-copies") == 4


@pytest.mark.parametrize("given", [None, Path("checkout")])
def test_a_rehearsal_runs_every_step_on_a_tiny_model(tmp_path, given):
    for real in gpu_check.steps(tmp_path, tmp_path, given, num_gpus=2):
        tiny = gpu_check.rehearse(real)
        assert tiny.command[: len(real.command)] == real.command
        added = tiny.command[len(real.command) :]
        for option in ("--workloads", "--workload"):
            if option in real.command:
                assert added[added.index(option) + 1] == "vit_nano:2"
        if "pytest" in real.command:
            assert added == ("--collect-only", "-q")


def test_gpu_check_in_three_parts(tmp_path):
    found = gpu_check.steps(tmp_path, None, None, time_anyway=True)
    parts = [gpu_check.choose(found, None, part) for part in (1, 2, 3)]
    assert [*parts[0], *parts[1], *parts[2]] == gpu_check.choose(found, None, None) == found
    assert [step.name for step in parts[0]] == ["operator-tests", "graphs-tests", "attention", "profile", "step"]
    assert [step.name for step in gpu_check.choose(found, ["host"], None)] == ["host"]
    with pytest.raises(SystemExit, match=r"--only other: choose of operator-tests"):
        gpu_check.choose(found, ["other"], None)
    timed = {step.name for step in found if "--time-anyway" in step.command}
    assert timed == {"step", "base", "large", "small", "huge", "autotune", "operators", "targets"}


def test_archive_of_results_leaves_out_what_is_largest(tmp_path):
    out, archive = tmp_path / "h100-2026-11-26", tmp_path / "part1.tar.gz"
    (out / "others").mkdir(parents=True)
    (out / "summary.json").write_text("{}")
    (out / "others" / "step.json").write_text("[]")
    (out / "trace.json.gz").write_bytes(os.urandom(20_000))
    assert gpu_check.write_archive(out, archive, most=10_000) == ["trace.json.gz"]
    assert archive.stat().st_size <= 10_000
    with tarfile.open(archive) as file:
        assert sorted(file.getnames()) == [f"{out.name}/others/step.json", f"{out.name}/summary.json"]
    assert gpu_check.write_archive(out, archive) == []
    assert list(tmp_path.glob(".*")) == []


def test_gpu_check_runs_every_test_that_needs_a_gpu(tmp_path):
    paths = {word for step in gpu_check.steps(tmp_path, None, None) for word in step.command if "tests/" in word}
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py") if "mark.gpu" in path.read_text()}
    assert len(marked) >= 8
    assert all(any(name.startswith(path) for path in paths) for name in marked - {"tests/benchmarks/test_programs.py"})


def test_a_file_that_cannot_be_imported_does_not_end_the_other_tests(tmp_path):
    (tmp_path / "test_bad.py").write_text("import no_such_package")
    (tmp_path / "test_good.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_good():\n    pass\n")
    command = gpu_check.steps(tmp_path, None, None)[0].command
    assert command[-1] == "tests/kernels"
    done = subprocess.run([*command[:-1], tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 passed" in done.stdout


def test_gpu_check_imports_no_test_that_needs_more_than_is_carried(tmp_path):
    """On a bare machine a file that cannot be imported counts as a failure."""
    words = {
        word for step in gpu_check.steps(tmp_path, None, None) for word in step.command if word.startswith("tests/")
    }
    paths = {path for word in words for path in [ROOT / word, *(ROOT / word).rglob("test_*.py")] if path.is_file()}
    assert len(paths) >= 15
    missing = re.compile(
        r"^(from|import) (torchvision|tensorboard|matplotlib|scipy|sklearn|timm|transformers)\b", re.MULTILINE
    )
    assert [path for path in paths if missing.search(path.read_text())] == []
