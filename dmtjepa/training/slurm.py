"""A run as a SLURM job that survives preemption, time limits, requeues and lost nodes (submitit)."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from dataclasses import dataclass

import submitit

from dmtjepa.config import Config
from dmtjepa.errors import UserError
from dmtjepa.training.distributed import DistributedError, LostPeer
from dmtjepa.training.launch import run_process
from dmtjepa.training.signals import REQUEUE_SIGNALS

logger = logging.getLogger(__name__)

# A task needs seconds to import what it runs. A signal that comes before submitit's handlers would end it by default,
# and nobody would requeue the job. So tasks start with these signals blocked, which keeps them for `receive_signals`.
_HOLD = (
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_BLOCK, {sorted(map(int, REQUEUE_SIGNALS))}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
# How long a process waits for SLURM to end it: after being told to stop, or after losing a node, which SLURM finds out
# by itself (SlurmdTimeout, 300 s by default) and answers by requeueing the job. A job that ended before would be lost.
PATIENCE_SECONDS = 600


class SubmissionError(UserError, RuntimeError):
    """SLURM did not take a job."""


def task_python() -> str:
    """The command that runs Python in a task, for submitit: it holds user signals until `receive_signals`."""
    return shlex.join([sys.executable, "-c", _HOLD])


def receive_signals() -> None:
    """Let the handlers of user signals have those that were held, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE_SIGNALS)


@dataclass
class Job:
    """What each task of the job runs; submitit pickles it. All state is in the run folder, none in here."""

    config: Config
    device: str

    def __call__(self) -> None:
        receive_signals()  # submitit's handlers are in place
        # A rank that died in a collective while the job was requeued has left its error as the job's result.
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            outcome = run_process(self.config, self.device)
        except LostPeer as error:
            logger.warning("%s; waiting for SLURM to requeue the job", error)
            time.sleep(PATIENCE_SECONDS)
            raise
        if outcome.complete:
            return
        # Saved. submitit's own handler of SIGUSR2 is in place again: on rank 0 it requeues the job and exits. After
        # SIGTERM alone, either the user cancelled the job or SLURM itself will requeue it.
        if REQUEUE_SIGNALS & set(outcome.signals):
            signal.raise_signal(signal.SIGUSR2)
        time.sleep(PATIENCE_SECONDS)
        raise DistributedError("stopped by SIGTERM and saved; nobody requeued or ended the job since: submit it again")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before it requeues the job: the same again, which resumes from the run folder."""
        return submitit.helpers.DelayedSubmission(self)
