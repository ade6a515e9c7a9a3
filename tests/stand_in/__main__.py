"""Run a command on GPUs that are not there: `python -m tests.stand_in [--capability 80] [--devices 4] COMMAND ...`.

What is real and what is not: tests/stand_in/runtime.c. At the end it says which process had a context on which device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from tests.stand_in.build import Unavailable, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stand_in", description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", choices=("80", "90"), default="90", help="80: an A100; 90: an H100")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("which command?")
    try:
        variables = build() | {"STAND_IN_CAPABILITY": options.capability, "STAND_IN_DEVICES": str(options.devices)}
    except Unavailable as error:
        print(f"the stand-in for CUDA: {error}", file=sys.stderr)
        return 1
    with tempfile.NamedTemporaryFile(mode="r", prefix="stand-in-") as log:
        done = subprocess.run(options.command, env=os.environ | variables | {"STAND_IN_LOG": log.name})
        for line in log:
            _, process, device, function = line.split()
            print(f"process {process} had a context on device {device}, by {function}", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
