"""Train DMT-JEPA on this machine: `python main.py --fname configs/quickstart.yaml --devices cuda:0 cuda:1`.

One process per device is started, or this is one of torchrun's processes: `torchrun --nproc-per-node 8 main.py ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

USAGE = "any setting can follow as section.key=value, e.g. data.batch_size=64 logging.folder=runs/mine"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `overrides` holds `section.key=value` settings."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fname", required=True, help="settings file (YAML)")
    parser.add_argument("--devices", nargs="+", help="cuda:0 cuda:1 ... or cpu cpu ...; default: all GPUs, or the CPU")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what they need, and stop")
    options, rest = parser.parse_known_args(arguments)
    # `--devices cpu cpu data.batch_size=8`: what has a `=` is a setting.
    given = options.devices or []
    options.devices = [name for name in given if "=" not in name] or None
    options.overrides = [name for name in given if "=" in name] + rest
    wrong = [text for text in options.overrides if "=" not in text or text.startswith("-")]
    if wrong:
        parser.error(f"unknown arguments: {' '.join(wrong)}; {USAGE}")
    return options


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Imported late: a mistyped command line is answered at once.
    from dmtjepa.config import ConfigError, load_config
    from dmtjepa.errors import UserError
    from dmtjepa.training.distributed import check_device, parse_device
    from dmtjepa.training.launch import default_devices, hand_over, launch, run_process

    try:
        config = load_config(options.fname, options.overrides)
        under_torchrun = "RANK" in os.environ
        if under_torchrun and options.devices:
            raise ConfigError("--devices is main.py's own way to start processes; under torchrun leave it out")
        devices = options.devices or default_devices()
        check = parse_device if options.dry_run else check_device
        for name in devices:
            check(name)
        if options.dry_run:
            from dmtjepa.training.estimate import describe

            world_size = int(os.environ.get("WORLD_SIZE", len(devices)))
            print(describe(config, world_size, devices[0]))
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
