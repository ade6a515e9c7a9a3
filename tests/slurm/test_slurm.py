"""A run on two real SLURM nodes, interrupted in every way that a cluster knows."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from dmtjepa.training.launch import launch
from tests.helpers.slurm_cluster import Cluster, free_ports, install

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("apt-get") is None, reason="needs root on a Debian system"),
]


@pytest.fixture(scope="module")
def cluster():
    install()
    folder = Path(tempfile.mkdtemp(prefix="dmtjepa-slurm-"))  # pytest's own folders are too long for a socket's name
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition, what, describe, seconds=1200):
    """Poll until the condition holds. The timeout only ends a hang."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} has not happened within {seconds} s\n{describe()}"
        time.sleep(0.1)
    return value


def test_interrupted_job_ends_like_an_uninterrupted_run(cluster, settings, losses, weights, tmp_path):
    changes = {"data.batch_size": 8, "optimization.epochs": 4, "runtime.log_every": 1, "runtime.save_every_steps": 3}
    undisturbed = settings("undisturbed", **changes)
    assert launch(undisturbed, ["cpu", "cpu"]) == 0

    config = settings("run", **changes)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [
        sys.executable, ROOT / "tests/helpers/tiny_job.py", "--fname", path, "--folder", tmp_path / "logs",
        "--partition", "debug", "--nodes", "2", "--tasks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-task", "1",
        "--time", "600", "--signal-delay", "150",
    ]  # fmt: skip
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def allow(steps):
        """Let the job take this many steps in all; replaced at once, because the job reads it before every step."""
        writing = tmp_path / "allowed_steps.writing"
        writing.write_text(str(steps))
        os.replace(writing, tmp_path / "allowed_steps")

    allow(0)
    submitted = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert submitted.returncode == 0, submitted.stderr
    number = submitted.stdout.split()[0]
    folder = Path(config.logging.folder)

    def starts():
        try:
            return json.loads((folder / "environment.json").read_text())["starts"]
        except FileNotFoundError:
            return []

    def describe():
        logs = [f"--- {log}\n{log.read_text()[-3000:]}" for log in sorted((tmp_path / "logs").rglob("*.out"))]
        return "\n".join([str(cluster.job(number)), str([row["step"] for row in starts()]), *logs])

    def train(known_starts):
        """Wait for a start after those that are known, and let it take 5 steps of its own."""
        wait_for(lambda: len(starts()) > known_starts, f"start {known_starts + 1}", describe)
        goal = starts()[-1]["step"] + 5
        allow(goal)
        csv = folder / "jepa_r0.csv"  # the first start writes it after it has been recorded
        wait_for(lambda: csv.exists() and len(losses(config)) >= goal, f"step {goal}", describe)
        return len(starts())

    def wait_for_restart(count):
        wait_for(lambda: int(cluster.job(number)["Restarts"]) >= count, f"restart {count}", describe)

    known = train(0)
    # Preempted: the job is told by its user signal, saves and requeues itself while another takes the nodes.
    cluster.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    known = train(known)
    resumed_after_preemption = starts()[-1]["step"]

    # Timed out: 150 seconds before its limit, or some seconds earlier, SLURM sends the job its user signal. The limit
    # is a whole number of minutes: 2 to 3 minutes from now. The requeued job has it too, until it gets its old one.
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    cluster.command("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 3}")
    wait_for_restart(2)
    cluster.command("scontrol", "update", f"JobId={number}", "TimeLimit=600")
    known = train(known)

    # Requeued by force: nobody is asked to save.
    cluster.command("scontrol", "requeue", number)
    known = train(known)

    # A node is lost, and comes back.
    cluster.lose_node("node2")
    wait_for(lambda: cluster.job(number)["JobState"] != "RUNNING", "the loss of the node", describe)
    cluster.start_node("node2")

    # Preempted again while it imports what it runs, long before it trains.
    log = tmp_path / f"logs/job_{number}/{number}_0_log.out"
    begun = "Starting with JobEnvironment"
    seen = log.read_text().count(begun)
    wait_for(lambda: log.read_text().count(begun) > seen, "the start after the loss of a node", describe)
    restarts = int(cluster.job(number)["Restarts"])
    cluster.command("scancel", "--signal=USR2", number)
    wait_for_restart(restarts + 1)
    train(known)

    allow(1_000_000)
    wait_for(lambda: cluster.job(number)["JobState"] not in ("RUNNING", "COMPLETING"), "the end", describe)
    assert cluster.job(number)["JobState"] == "COMPLETED", describe()
    assert resumed_after_preemption >= 5  # it was saved when it was preempted, not at step 3
    assert len(starts()) >= 5
    assert losses(config) == losses(undisturbed)
    old, new = weights(undisturbed), weights(config)
    assert all(bool((old[name] == new[name]).all()) for name in old)


def test_processes_that_do_not_come_are_named(cluster, settings, tmp_path):
    """One of two nodes never starts its process: the other says so, within the set time, instead of training alone."""
    config = settings("alone", **{"data.batch_size": 8, "runtime.start_timeout": 5})
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (port,) = free_ports(1)
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["srun", "-N1", "-w", "node1", sys.executable, ROOT / "tests/helpers/tiny_main.py", "--fname", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode != 0
    assert f"rank 0 of 2 on node1 could not join the run at 127.0.0.1:{port} within 5 s" in done.stderr
    assert "ranks [1] have not come" in done.stderr
    assert not Path(config.logging.folder).exists()
