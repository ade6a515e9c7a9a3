"""`dmtjepa submit` and main_distributed.py: train on a SLURM cluster, as a job that requeues itself."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmtjepa.arguments import COMMAND_LINE, USAGE, add_settings, describe_command, parse_with_overrides
from dmtjepa.cli.exit_status import run_command

if TYPE_CHECKING:
    import submitit

    from dmtjepa.config import Config


DESCRIPTION = """Train on a SLURM cluster, as a job that requeues itself.

The job saves and requeues when it is preempted or reaches its time limit, and resumes from its run folder
(logging.folder, which all nodes must share) after any interruption. --folder takes submitit's logs."""


def parse_arguments(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> argparse.Namespace:
    """The command line; `overrides` holds `section.key=value` settings.

    Args:
        prog: the command that takes settings files as they are; None takes them as `--fname`.
    """
    command = "python main_distributed.py --fname" if prog is None else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            DESCRIPTION,
            f"{command} in1k_vith14_ep300 --folder logs --partition gpu \\\n"
            "      --nodes 2 --tasks-per-node 8 --time 4300",
            note=USAGE,
        ),
    )
    add_settings(parser, as_option=prog is None, several="several become an array of jobs")
    _add_options(parser)
    options = parse_with_overrides(parser, arguments, list_option="fname")
    if options.fname is None:
        parser.error("--fname names no settings file")
    # SLURM may send its signal up to a minute early, and each start needs time to import, resume and train.
    if options.time * 60 < options.signal_delay + 120:
        parser.error(
            f"--time {options.time} leaves no time to train: the job saves {options.signal_delay} s (--signal-delay) "
            f"before its limit, or up to a minute earlier; allow at least {(options.signal_delay + 179) // 60} minutes"
        )
    gpus = options.tasks_per_node if options.gpus_per_node is None else options.gpus_per_node
    options.gpus_per_node = gpus or None  # SLURM gets no number of GPUs rather than 0
    return options


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch-launch", action="store_true", help="the file is a YAML list of settings files")
    add("--folder", metavar="FOLDER", required=True, help="folder of submitit's logs, one job_%%j per job")
    add("--partition", help="partition to submit to")
    add("--nodes", type=int, metavar="N", default=1, help="nodes of a job (%(default)s)")
    add("--tasks-per-node", type=int, metavar="N", default=1, help="processes of a node, one per GPU (%(default)s)")
    add(
        "--time",
        type=int,
        metavar="MINUTES",
        default=4300,
        help="limit (%(default)s), at which the job requeues itself",
    )
    add("--gpus-per-node", type=int, metavar="N", help="default: as many as tasks; 0 trains on CPUs")
    add("--cpus-per-task", type=int, metavar="N", default=10, help="for the process and its loader (%(default)s)")
    add("--memory", help="of a node, e.g. 500GB; default: the cluster's")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features that nodes must have, e.g. h100")
    add("--exclude", help="nodes not to use")
    add("--dependency", help="e.g. afterok:123")
    add("--job-name", metavar="NAME", default="dmtjepa", help="name of the jobs (%(default)s)")
    add(
        "--array-parallelism",
        type=int,
        metavar="N",
        default=256,
        help="jobs of an array that run at a time (%(default)s)",
    )
    add("--signal-delay", type=int, metavar="SECONDS", default=120, help="before the limit the job saves (%(default)s)")
    add(
        "--max-timeouts",
        type=int,
        metavar="N",
        default=1000,
        help="time limits after which it is not requeued (%(default)s)",
    )
    add("--dry-run", action="store_true", help="print what SLURM would be asked for and submit nothing")


# Options that SLURM gets: the parameter of submitit, and the directive of sbatch that submitit writes for it.
DIRECTIVES = {
    "job_name": ("name", "job-name"),
    "partition": ("slurm_partition", "partition"),
    "nodes": ("nodes", "nodes"),
    "tasks_per_node": ("tasks_per_node", "ntasks-per-node"),
    "gpus_per_node": ("gpus_per_node", "gpus-per-node"),
    "cpus_per_task": ("cpus_per_task", "cpus-per-task"),
    "memory": ("slurm_mem", "mem"),
    "time": ("timeout_min", "time"),
    "signal_delay": ("slurm_signal_delay_s", "signal"),
    "account": ("slurm_account", "account"),
    "qos": ("slurm_qos", "qos"),
    "constraint": ("slurm_constraint", "constraint"),
    "exclude": ("slurm_exclude", "exclude"),
    "dependency": ("slurm_dependency", "dependency"),
}
# The job requeues itself, and the log of each start follows that of the last.
ALWAYS = {"requeue": True, "open-mode": "append"}


def select_directives(options: argparse.Namespace) -> dict[str, object]:
    """The options in DIRECTIVES that were given, by name."""
    return {name: getattr(options, name) for name in DIRECTIVES if getattr(options, name) is not None}


def describe_job(options: argparse.Namespace) -> str:
    """The resources that a job asks SLURM for, as lines of an sbatch script."""
    values = {DIRECTIVES[name][1]: value for name, value in select_directives(options).items()} | ALWAYS
    values["signal"] = f"USR2@{values['signal']}"
    lines = [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in sorted(values.items())]
    return "\n".join(lines)


def read_configs(options: argparse.Namespace) -> dict[str, Config]:
    """The settings of each job by the name of its file.

    Raises:
        ConfigError, MaskError: a file cannot be used, or two jobs would write into the same folder.
    """
    from dmtjepa.config import ConfigError, find_settings, load_config, read_yaml
    from dmtjepa.training.check import check_settings

    names = options.fname
    if options.batch_launch:
        lists = [read_yaml(find_settings(name)) for name in names]
        if not all(isinstance(item, list) and all(isinstance(name, str) for name in item) for item in lists):
            raise ConfigError(f"--batch-launch: {', '.join(names)} must hold a YAML list of names of settings files")
        names = [name for item in lists for name in item]
    configs = [
        (name, load_config(find_settings(name), options.overrides, overrides_from=COMMAND_LINE)) for name in names
    ]
    for _, config in configs:
        check_settings(config, options.nodes * options.tasks_per_node)
    folders = {os.path.realpath(config.logging.path) for _, config in configs}
    if len(folders) < len(configs):
        raise ConfigError("two of the settings files write into the same logging.folder")
    return dict(configs)


def submit(options: argparse.Namespace, configs: Sequence[Config]) -> list[submitit.Job[Any]]:
    """Submit one job for each run.

    Raises:
        SubmissionError: sbatch refuses them, or the folder of the logs cannot be written.
    """
    import submitit

    from dmtjepa.config import expand_path
    from dmtjepa.training.slurm import Job, SubmissionError, task_python

    folder = Path(expand_path(options.folder, "--folder"))
    try:
        executor = submitit.AutoExecutor(
            folder=folder / "job_%j",
            cluster="slurm",
            slurm_max_num_timeout=options.max_timeouts,
            slurm_python=task_python(),
        )
        executor.update_parameters(
            stderr_to_stdout=True,
            slurm_array_parallelism=options.array_parallelism,
            slurm_additional_parameters=ALWAYS,
            **{DIRECTIVES[name][0]: value for name, value in select_directives(options).items()},
        )
        with executor.batch():
            return [executor.submit(Job(config, "cuda" if options.gpus_per_node else "cpu")) for config in configs]
    except submitit.core.utils.FailedJobError as error:
        raise SubmissionError(f"sbatch refused the job; nothing was submitted: {str(error).strip()}") from error
    except OSError as error:
        raise SubmissionError(f"the job could not be submitted: {error}; its logs go to --folder {folder}") from error


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(arguments, prog=prog)
    return run_command(lambda: start(options))


def start(options: argparse.Namespace) -> int:
    """Submit the jobs, or print what SLURM would be asked for; returns the exit status."""
    from dmtjepa.training.slurm import SubmissionError

    configs = read_configs(options)
    if options.dry_run:
        print(describe_job(options))
        return 0
    if shutil.which("srun") is None:
        raise SubmissionError("SLURM (srun) is not on this machine: run this on a login node, or train without SLURM")
    jobs = submit(options, list(configs.values()))
    for (name, config), job in zip(configs.items(), jobs, strict=True):
        print(f"{job.job_id}  {name}  run: {config.logging.path}  logs: {job.paths.folder}")
    return 0
