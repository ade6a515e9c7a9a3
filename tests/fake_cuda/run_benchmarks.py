"""Run programs of benchmarks/, given with their options as JSON, one after the other; prints how each failed, or null.

All results count as right: the values on a GPU that is not there are all zero.
"""

import functools
import importlib
import json
import math
import sys
import traceback
from unittest import mock

import torch

from benchmarks import machine
from benchmarks.step import memory, runs, target_head
from tests.helpers import no_machine_code  # noqa: F401


def run(name: str, options: list[str]) -> str | None:
    program = importlib.import_module(f"benchmarks.{name}")
    with mock.patch.object(sys, "argv", [name, *options]):
        try:
            program.main()
        except (Exception, SystemExit):
            return traceback.format_exc()
    return None


if __name__ == "__main__":
    everything = dict.fromkeys(target_head.LIMITS, (math.inf, 1.0))
    briefly = functools.partial(machine._gpu_milliseconds, most=10, budget_ms=0)
    with (
        mock.patch.object(runs, "_relative", return_value=0.0),
        mock.patch.object(target_head, "LIMITS", everything),
        mock.patch.object(machine, "_gpu_milliseconds", briefly),
        mock.patch.object(memory, "USABLE", 0.002),  # the host makes the images of the largest batch
        mock.patch.object(torch, "compile", lambda function, **options: function),  # full_step.py compiles
    ):
        print(json.dumps({name: run(name, options) for name, options in json.loads(sys.argv[1]).items()}))
