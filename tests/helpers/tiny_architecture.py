"""Makes `vit_tiny` a network that takes milliseconds a step. Imported by the processes of these tests alone.

Each step checks that the thread has a signal stack: ranks of main.py, of torchrun and of SLURM jobs import this.
"""

import sys

from dmtjepa.models import ARCHITECTURES
from dmtjepa.training.step import TrainStep
from tests.helpers.signal_stack import has_signal_stack

ARCHITECTURES["vit_tiny"] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def _make_checked(train_step):
    def make_step(self, micro_batches, step):
        assert self.device.type != "cpu" or has_signal_stack(), "a signal would damage the memory of this process"
        return train_step(self, micro_batches, step)

    return make_step


if sys.platform == "linux":
    TrainStep.__call__ = _make_checked(TrainStep.__call__)
