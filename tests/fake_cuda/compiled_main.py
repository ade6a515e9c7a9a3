"""main.py with the tiny network, compiled by all of torch.compile but Inductor, which takes most of the time.

What Inductor and Triton make of the blocks is tested by full_step.py.
"""

import functools
import sys

import torch

import tests.helpers.tiny_architecture  # noqa: F401
from tests.helpers import no_machine_code  # noqa: F401

torch.compile = functools.partial(torch.compile, backend="aot_eager")
import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main.main())
