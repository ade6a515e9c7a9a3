"""Train DMT-JEPA on this machine: `python main.py --fname configs/quickstart.yaml --devices cuda:0 cuda:1`.

One process per device is started, or this is one of torchrun's processes: `torchrun --nproc-per-node 8 main.py ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from dmtjepa.arguments import USAGE, parse_with_overrides
from dmtjepa.output import protect_output

if TYPE_CHECKING:
    from dmtjepa.config import Config


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `overrides` holds `section.key=value` settings."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fname", required=True, help="settings file (YAML)")
    parser.add_argument("--devices", nargs="+", help="cuda:0 cuda:1 ... or cpu cpu ...; default: all GPUs, or the CPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the settings and what they need, and stop"
    )
    return parse_with_overrides(parser, arguments, list_option="devices")


def dry_run(config: Config, world_size: int, device: str) -> None:
    """Print the settings and what they need. Raises the error that a start would end with before its first step."""
    from dmtjepa.training.check import check_dry_run, check_settings
    from dmtjepa.training.estimate import describe

    check_settings(config, world_size)  # what they do not allow cannot be described
    print(describe(config, world_size, device), flush=True)
    check_dry_run(config, world_size, device.partition(":")[0])


def main() -> int:
    protect_output()
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Imported late: a mistyped command line is answered at once.
    from dmtjepa.config import ConfigError, expand_path, load_config
    from dmtjepa.errors import UserError
    from dmtjepa.training.distributed import check_device, parse_device, read_rank
    from dmtjepa.training.launch import default_devices, hand_over, launch, run_process

    try:
        config = load_config(expand_path(options.fname, "--fname"), options.overrides)
        _, world_size = read_rank()
        under_torchrun = bool(os.environ.get("RANK"))
        if under_torchrun and options.devices:
            raise ConfigError("--devices is main.py's own way to start processes; under torchrun leave it out")
        devices = options.devices or default_devices()
        check = parse_device if options.dry_run else check_device
        for name in devices:
            check(name)
        if options.dry_run:
            dry_run(config, world_size if under_torchrun else len(devices), devices[0])
            return 0
        if under_torchrun:
            hand_over(run_process(config, devices[0].partition(":")[0]))
            return 0
        return launch(config, devices)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted while no step was trained; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
