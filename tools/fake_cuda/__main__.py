"""Run a command on fake GPUs: `python -m tools.fake_cuda [--capability 80] [--devices 4] COMMAND ...`.

What is real and what is not: tools/fake_cuda/runtime.c. At the end it says which process had a context on which device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from tools.fake_cuda.build import Unavailable, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fake_cuda", description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", choices=("80", "90"), default="90", help="80: an A100; 90: an H100")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("which command?")
    try:
        variables = build() | {"FAKE_CUDA_CAPABILITY": options.capability, "FAKE_CUDA_DEVICES": str(options.devices)}
    except Unavailable as error:
        print(f"fake CUDA: {error}", file=sys.stderr)
        return 1
    with tempfile.NamedTemporaryFile(mode="r", prefix="fake-cuda-") as log:
        done = subprocess.run(options.command, env=os.environ | variables | {"FAKE_CUDA_LOG": log.name})
        for line in log:
            _, process, device, function = line.split()
            print(f"process {process} had a context on device {device}, by {function}", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
