"""`main_distributed.py`: what SLURM is asked for, and what is refused. No cluster is needed."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

import main_distributed
from dmtjepa.training.slurm import task_python

ROOT = Path(__file__).parents[1]


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


def test_job_needs_more_time_than_its_signal_leaves(capsys, tmp_path):
    config = str(ROOT / "configs/in1k_vitb16_ep600.yaml")
    command = ["--fname", config, "--folder", str(tmp_path), "--signal-delay", "150", "--dry-run"]
    with pytest.raises(SystemExit):
        main_distributed.main([*command, "--time", "4"])
    error = capsys.readouterr().err
    assert "--time 4 leaves no time to train" in error
    assert "at least 5 minutes" in error
    assert main_distributed.main([*command, "--time", "5"]) == 0


@pytest.mark.slow
def test_signal_before_the_handlers_is_held_for_them():
    program = "\n".join(
        [
            "import signal",
            "print('importing', flush=True)",
            "input()",
            "from dmtjepa.training.slurm import receive_signals",
            "signal.signal(signal.SIGUSR2, lambda *_: print('received', flush=True))",
            "receive_signals()",
        ]
    )
    command = [*shlex.split(task_python()), "-u", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate("\n", timeout=600)
    assert (process.returncode, output) == (0, "received\n")
