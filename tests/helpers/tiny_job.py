"""main_distributed.py with the tiny network, in a job that takes as many steps as the test allows."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

import tests.helpers.tiny_architecture  # noqa: F401
from dmtjepa.training import slurm
from dmtjepa.training.signals import StopSignals
from dmtjepa.training.step import TrainStep


@dataclass
class TinyJob(slurm.Job):
    """Pickled by name: the nodes import this module, and with it the tiny network.

    Rank 0 waits before a step until the test allows it in the file `allowed_steps` beside the run folder, or until a
    signal asks the run to stop. The other rank waits for rank 0.
    """

    def __call__(self) -> None:
        enter, original = StopSignals.__enter__, TrainStep.__call__
        allowed = Path(self.config.logging.folder).with_name("allowed_steps")
        entered = []

        def enter_and_remember(signals):
            entered.append(signals)
            return enter(signals)

        def train_step(train_step, micro_batches, step):
            while dist.get_rank() == 0 and step >= int(allowed.read_text()) and not entered[-1].received:
                time.sleep(0.02)
            return original(train_step, micro_batches, step)

        StopSignals.__enter__, TrainStep.__call__ = enter_and_remember, train_step
        super().__call__()


if __name__ == "__main__":
    import main_distributed
    from tests.helpers import tiny_job

    slurm.Job = tiny_job.TinyJob
    sys.exit(main_distributed.main())
