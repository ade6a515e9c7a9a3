"""`dmtjepa check SOURCE`: read and decode every image before a long run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command


def main(arguments: Sequence[str] | None = None, *, prog: str = "dmtjepa check") -> int:
    """Run the command line; returns 1 if images are corrupt, 2 if there are none to check."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            "Read and decode every image, and report what is there. The exit code is 1 if some are corrupt.",
            "dmtjepa check photos",
            "dmtjepa check shards --workers 8",
        ),
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of images, file list (.txt, .tsv, .lst), tar shards, or hf:NAME"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=len(os.sched_getaffinity(0)),
        help="number of processes (%(default)s)",
    )
    parser.add_argument("--channels", type=int, metavar="N", default=3, help="channels, as data.channels (%(default)s)")
    parser.add_argument(
        "--max-value", type=float, metavar="VALUE", help="as data.max_value: what counts as 1, of more than 8 bits"
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        metavar="N",
        default=100,
        help="as data.max_megapixels: larger images count as unreadable (%(default)s)",
    )
    parser.add_argument(
        "--measured",
        type=int,
        metavar="N",
        default=2000,
        help="images whose mean and standard deviation are measured (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.max_value is not None and options.max_value <= 0:
        parser.error("--max-value must be larger than 0")
    if not 0 < options.max_megapixels <= 178:  # PIL decodes no larger ones
        parser.error("--max-megapixels must be larger than 0 and at most 178")
    if options.workers < 1 or options.channels < 1 or options.measured < 0:
        parser.error("--workers and --channels must be at least 1, --measured at least 0")
    return run_command(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    from dmtjepa.data import DataError, open_images
    from dmtjepa.data.check import check

    try:
        found = check(
            open_images(options.source),
            options.workers,
            channels=options.channels,
            max_value=options.max_value,
            max_megapixels=options.max_megapixels,
            max_measured=options.measured,
        )
    except DataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(str(found).encode(errors="backslashreplace").decode())  # file names can be any bytes
    return 1 if found.corrupt else 0
