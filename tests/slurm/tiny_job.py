"""main_distributed.py with the tiny network and steps as slow as the test wants, so that it can be interrupted."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_architecture  # noqa: F401

from dmtjepa.training import slurm
from dmtjepa.training.step import TrainStep


@dataclass
class TinyJob(slurm.Job):
    """Pickled by name: the nodes import this module, and with it the tiny network."""

    def __call__(self) -> None:
        original = TrainStep.__call__
        pace = Path(self.config.logging.folder).with_name("pace")  # seconds that a step takes longer

        def slow_step(*arguments):
            time.sleep(float(pace.read_text()))
            return original(*arguments)

        TrainStep.__call__ = slow_step
        super().__call__()


if __name__ == "__main__":
    import tiny_job

    import main_distributed

    slurm.Job = tiny_job.TinyJob
    sys.exit(main_distributed.main())
