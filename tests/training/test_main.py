"""The command line, as a new user would get it wrong, and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import main
import main_distributed

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(config, *arguments) -> exit code and everything printed by main.py."""

    def call(config, *arguments):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        monkeypatch.setattr(sys, "argv", ["main.py", "--fname", str(path), *arguments])
        code = main.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root_path=/not/there"], "/not/there"),
        (["data.batchsize=4"], "data.batchsize: unknown key; did you mean batch_size?"),
        (["data.batch_size=1000"], "the batch is larger than the data set"),
        (["data.batch_size=many"], "data.batch_size"),
        (["data.crop_size=2"], "smaller than a patch"),
        (["mask.min_keep=60"], "min_keep"),
        (["--devices", "cpu", "gpu:0"], "write cpu, cuda or cuda:N"),
        (["runtime.accumulation=9"], "lower runtime.accumulation"),
    ],
)
def test_wrong_settings_are_answered_in_a_line(run, settings, arguments, message):
    config = settings()
    code, text = run(config, *(arguments if "--devices" in arguments else ["--devices", "cpu", *arguments]))
    assert code == 1
    assert message in text
    assert "Traceback" not in text
    assert not list(Path(config.logging.folder).glob("*.csv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_gpu_that_is_not_there(run, settings):
    code, text = run(settings(), "--devices", "cuda:0")
    assert code == 1
    assert "no usable CUDA device; pass --devices cpu" in text


def test_empty_folder(run, settings, tmp_path):
    (tmp_path / "empty").mkdir()
    code, text = run(settings(), "--devices", "cpu", f"data.root_path={tmp_path / 'empty'}")
    assert code == 1
    assert "empty" in text


def test_missing_settings_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["main.py", "--fname", str(tmp_path / "quikstart.yaml")])
    assert main.main() == 1
    assert "did you mean" in capsys.readouterr().err


def test_unknown_argument(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--fname", "x.yaml", "--device", "cpu", "--gpus", "3"])
    with pytest.raises(SystemExit) as error:
        main.main()
    assert error.value.code == 2
    assert "section.key=value" in capsys.readouterr().err


def test_settings_can_follow_devices():
    options = main.parse_arguments(["--fname", "x.yaml", "--devices", "cpu", "cpu", "data.batch_size=8"])
    assert options.devices == ["cpu", "cpu"]
    assert options.overrides == ["data.batch_size=8"]


def test_dry_run_writes_nothing(run, settings):
    config = settings()
    code, text = run(config, "--dry-run", "--devices", "cpu", "cpu")
    assert code == 0
    assert "effective batch    32 = 16 x 2 processes x 1 accumulated" in text
    assert "GFLOP" in text
    assert not Path(config.logging.folder).exists()


def test_dry_run_of_a_gpu_needs_none(run, settings):
    code, text = run(settings(), "--dry-run", "--devices", "cuda:0", "cuda:1")
    assert code == 0
    assert "processes          2 (cuda)" in text
    code, text = run(settings(), "--dry-run", "--devices", "gpu")
    assert code == 1
    assert "DeviceError: device 'gpu'" in text


@pytest.mark.slow
def test_torchrun_gives_the_run_of_main(plain, settings, losses, tmp_path):
    config = settings(**{"data.batch_size": 8})
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/helpers/tiny_main.py"), "--fname", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(config), losses(plain), rtol=0, atol=1e-5)


def test_dry_run_prints_what_slurm_is_asked_for(tmp_path, capsys):
    arguments = "--partition gpu --nodes 2 --tasks-per-node 8 --time 4300 --account vision --qos high --constraint h100"
    arguments += " --memory 500GB --cpus-per-task 12 --exclude node9 --dependency afterok:7 --signal-delay 90"
    config = str(ROOT / "configs/in1k_vitb16_ep600.yaml")
    command = ["--fname", config, "--folder", str(tmp_path / "logs"), *arguments.split()]
    assert main_distributed.main([*command, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in (
        "partition=gpu", "nodes=2", "ntasks-per-node=8", "time=4300", "account=vision", "qos=high", "constraint=h100",
        "mem=500GB", "cpus-per-task=12", "exclude=node9", "dependency=afterok:7", "signal=USR2@90", "gpus-per-node=8",
        "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert not (tmp_path / "logs").exists()


def test_submitted_script_has_what_the_dry_run_printed(monkeypatch, tmp_path, capsys):
    """`sbatch` and `srun` are programs that keep the script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": "#!/bin/sh\n", "sbatch": f"#!/bin/sh\ncp $1 {tmp_path}/script\necho job 7\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    command = ["--fname", str(ROOT / "configs/in1k_vitb16_ep600.yaml"), "--folder", str(tmp_path / "logs")]
    command += ["--partition", "gpu", "--nodes", "2", "--tasks-per-node", "8", "--memory", "500GB", "--qos", "high"]
    assert main_distributed.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert main_distributed.main(command) == 0
    assert set(printed) <= set((tmp_path / "script").read_text().splitlines())


def test_sbatch_that_refuses_a_job_is_quoted(monkeypatch, tmp_path, capsys):
    programs = tmp_path / "bin"
    programs.mkdir()
    script = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpux' >&2\nexit 1\n"
    for name in ("srun", "sbatch"):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    config = str(ROOT / "configs/in1k_vitb16_ep600.yaml")
    assert main_distributed.main(["--fname", config, "--folder", str(tmp_path / "logs"), "--partition", "gpux"]) == 1
    error = capsys.readouterr().err
    assert "SubmissionError: sbatch refused the job; nothing was submitted: " in error
    assert "invalid partition specified: gpux" in error
    (tmp_path / "file").touch()
    assert main_distributed.main(["--fname", config, "--folder", str(tmp_path / "file")]) == 1
    assert f"--folder {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a: b", "- 3"])
def test_a_list_of_settings_files_is_checked(tmp_path, capsys, text):
    (tmp_path / "list.yaml").write_text(text)
    command = ["--batch-launch", "--fname", str(tmp_path / "list.yaml"), "--folder", str(tmp_path), "--dry-run"]
    assert main_distributed.main(command) == 1
    assert "must hold a YAML list" in capsys.readouterr().err


def test_jobs_of_an_array_need_folders_of_their_own(tmp_path, capsys):
    config = str(ROOT / "configs/in1k_vitb16_ep600.yaml")
    assert main_distributed.main(["--fname", config, config, "--folder", str(tmp_path), "--dry-run"]) == 1
    assert "same logging.folder" in capsys.readouterr().err


def test_machine_without_slurm(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # other tests may have installed it
    config = str(ROOT / "configs/in1k_vitb16_ep600.yaml")
    assert main_distributed.main(["--fname", config, "--folder", str(tmp_path)]) == 1
    assert "srun" in capsys.readouterr().err
