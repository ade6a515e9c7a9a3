"""A real SLURM cluster of two nodes on this machine, without systemd or cgroups; needs root.

Each node is a `slurmd` in a UTS and mount namespace of its own, so that it has its own host name and everything that
runs on it can be found, and killed as a lost node would be.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun")

# submitit asks sacct for the state of jobs. Without an accounting database, this asks slurmctld.
SACCT = """#!/usr/bin/env -S python3 -I
import re, subprocess, sys
print("JobID|State|NodeList")
for job in [value for flag, value in zip(sys.argv, sys.argv[1:]) if flag == "-j"]:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        row = dict(re.findall(r"(?:^| )(\\w+)=(\\S*)", line))
        if "JobId" in row:
            print(row["JobId"], row["JobState"], row.get("NodeList", ""), sep="|")
"""


def install() -> None:
    """Install SLURM from Debian's packages, if it is not there."""
    if all(shutil.which(program, path=_path()) for program in PROGRAMS):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    packages = ["slurm-wlm", "munge"]
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], check=True, env=environment, stdout=subprocess.DEVNULL)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """The cluster, while entered. Partition `high` preempts `debug`, whose jobs get their user signal first."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ports = folder, free_ports(1 + len(NODES))
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "PATH": f"{folder / 'bin'}:{_path()}",
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self._folder
        for name in ("etc", "run", "log", "state", "bin", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        key = folder / "etc/munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        addresses = "".join(f"127.0.1.{number} {node}\n" for number, node in enumerate(NODES, start=1))
        (folder / "etc/hosts").write_text(Path("/etc/hosts").read_text() + addresses)
        (folder / "etc/slurm.conf").write_text(self._configuration())
        (folder / "bin/sacct").write_text(SACCT)
        (folder / "bin/sacct").chmod(0o755)
        munge = {"key-file": key, "socket": folder / "run/munge.socket", "pid-file": folder / "run/munged.pid"}
        munge |= {"log-file": folder / "log/munged.log", "seed-file": folder / "run/munged.seed"}
        self.command("munged", *(f"--{name}={value}" for name, value in munge.items()))
        self.command("slurmctld", "-f", folder / "etc/slurm.conf")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def __exit__(self, *_) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.command("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 60
            while self.command("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.1)
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            path = self._folder / f"run/{name}.pid"
            if path.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)

    def command(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a command of SLURM's; returns what it prints."""
        done = subprocess.run(
            [str(argument) for argument in arguments], env=self.environment, capture_output=True, text=True, timeout=300
        )
        if check and done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        """Start the `slurmd` of a node in namespaces of its own."""
        folder = self._folder
        start = f"mount --bind {folder}/etc/hosts /etc/hosts && hostname {node} && exec slurmd -N {node}"
        self.command("unshare", "-m", "-u", "--propagation", "private", "bash", "-c", start)

    def kill_node(self, node: str) -> None:
        """End everything on a node at once, as if it had lost power."""
        path = self._folder / f"run/slurmd.{node}.pid"
        if not path.exists():
            return
        space = _host_name_space(int(path.read_text()))
        if space is None or space == _host_name_space(os.getpid()):
            return
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _host_name_space(int(process.name)) == space:
                os.kill(int(process.name), signal.SIGKILL)
        path.unlink(missing_ok=True)

    def lose_node(self, node: str) -> None:
        """End everything on a node, and tell slurmctld at once what it would find out after SlurmdTimeout.

        A short SlurmdTimeout would also take nodes for lost that are only slow, as on a busy machine.
        """
        self.kill_node(node)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def wait_until_idle(self, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while self.command("sinfo", "-hNp", "debug", "-o", "%T").split() != ["idle"] * len(NODES):
            if time.monotonic() > deadline:
                raise RuntimeError(self.command("sinfo", "-Nl"))
            time.sleep(0.1)

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _configuration(self) -> str:
        folder, host = self._folder, socket.gethostname()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.1.{number} Port={self._ports[number]} "
            "CPUs=8 RealMemory=64000"
            for number, node in enumerate(NODES, start=1)
        )
        return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmctldPort={self._ports[0]}
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=60
TCPTimeout=30
KillWait=5
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 GraceTime=600
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _host_name_space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None
