"""`dmtjepa train` and main.py: train on this machine, with one process per device, or as a process of torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmtjepa.arguments import COMMAND_LINE, USAGE, add_settings, describe_command, parse_with_overrides
from dmtjepa.cli.exit_status import run_command
from dmtjepa.output import configure_logging

if TYPE_CHECKING:
    from dmtjepa.config import Config


DESCRIPTION = """Train on this machine: one process per device, or one of the processes of torchrun.

The run is in the folder logging.folder. Start it again with the same settings to continue it after any interruption."""


def parse_arguments(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> argparse.Namespace:
    """The command line; `overrides` holds `section.key=value` settings.

    Args:
        prog: the command that takes the settings file as it is; None takes it as `--fname`, as main.py does.
    """
    command = "python main.py --fname" if prog is None else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            DESCRIPTION,
            f"{command} quickstart",
            f"{command} small_images data.root_path=photos --dry-run",
            note=USAGE,
        ),
    )
    add_settings(parser, as_option=prog is None)
    parser.add_argument(
        "--devices", metavar="DEVICE", nargs="+", help="cuda:0 cuda:1 ... or cpu cpu ...; default: all GPUs, or the CPU"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the settings and what they need, and stop"
    )
    return parse_with_overrides(parser, arguments, list_option="devices")


def dry_run(config: Config, world_size: int, devices: Sequence[str]) -> None:
    """Print the settings and what they need. Raises the error that a start would end with before its first step."""
    from dmtjepa.training.check import check_dry_run, check_settings
    from dmtjepa.training.estimate import describe

    check_settings(config, world_size)  # what they do not allow cannot be described
    print(describe(config, world_size, devices[0]), flush=True)
    print(f"\n{check_dry_run(config, world_size, devices)}", flush=True)


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(arguments, prog=prog)
    configure_logging()
    return run_command(lambda: train(options), interrupted="interrupted while no step was trained; nothing was saved")


def train(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    from dmtjepa.config import ConfigError, find_settings, load_config
    from dmtjepa.devices import check_device, parse_device
    from dmtjepa.training.distributed import read_rank
    from dmtjepa.training.launch import default_devices, hand_over, launch, run_process

    config = load_config(find_settings(options.fname), options.overrides, overrides_from=COMMAND_LINE)
    _, world_size = read_rank()
    under_torchrun = bool(os.environ.get("RANK"))
    if under_torchrun and options.devices:
        raise ConfigError("--devices starts processes, as torchrun does; under torchrun leave it out")
    devices = options.devices or default_devices()
    check = parse_device if options.dry_run else check_device
    for name in devices:
        check(name)
    if options.dry_run:
        dry_run(config, world_size if under_torchrun else len(devices), devices)
        return 0
    if under_torchrun:
        hand_over(run_process(config, devices[0].partition(":")[0]))
        return 0
    return launch(config, devices)
