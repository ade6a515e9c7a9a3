"""main.py with the tiny network, compiled by all of torch.compile but Inductor, which takes most of the time.

What Inductor and Triton make of the blocks is tested by full_step.py.
"""

import functools
import sys

import torch

import main
import tests.helpers.tiny_architecture  # noqa: F401
from dmtjepa.training import parallelize
from tests.helpers import no_machine_code  # noqa: F401

without_inductor = functools.partial(torch.compile, backend="aot_eager")
parallelize.compile_blocks = functools.partial(parallelize.compile_blocks, compiler=without_inductor)

if __name__ == "__main__":
    code = main.main()
    assert not torch._dynamo.utils.counters["inductor"]
    sys.exit(code)
