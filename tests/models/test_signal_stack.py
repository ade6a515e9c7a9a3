"""Signals that arrive while oneDNN computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs sigaltstack and /proc of Linux")

# Prints whether this thread has an alternate signal stack, whether a process that it forks has one, as loader workers
# are, and the signal masks of the threads that OpenMP started.
REPORT = """
import os
from tests.helpers.signal_stack import has_signal_stack

def threads():
    return set(os.listdir("/proc/self/task"))

def fork():
    child = os.fork()
    if not child:
        os._exit(not has_signal_stack())
    return os.waitpid(child, 0)[1] == 0

def report(before):
    masks = set()
    for thread in threads() - before:
        with open(f"/proc/self/task/{thread}/status") as file:
            masks |= {line.split()[1] for line in file if line.startswith("SigBlk")}
    print(has_signal_stack(), fork(), len(threads() - before), *masks)
"""

BUILD = """
import torch
from dmtjepa.config import parse_config
from dmtjepa.objective import build_model

config = parse_config({"data": {"crop_size": 32}, "mask": {"patch_size": 8, "min_keep": 0},
                       "meta": {"model_name": "vit_small", "pred_emb_dim": 48, "pred_depth": 1}})
before = threads()
model = build_model(config, "cpu")
model.encoder(torch.randn(16, 3, 32, 32)).sum().backward()
report(before)
"""

FIRST_USE = """
import torch
from dmtjepa.models.onednn import onednn_linear

before = threads()
onednn_linear(torch.randn(256, 256), torch.randn(256, 256), None)
report(before)
"""

# Without an alternate signal stack this aborts within seconds on a CPU with AVX-512.
LOOP = """
import signal, sys, torch
from dmtjepa.models.onednn import onednn_linear

num_signals = 0

def count(number, frame):
    global num_signals
    num_signals += 1

signal.signal(signal.SIGALRM, count)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
with torch.no_grad():
    while num_signals < 3000:
        for length in (1, 4, 6, 14, 20, 36):
            x, weight = torch.randn(12, length, 128), torch.randn(384, 128)
            onednn_linear(x, weight, torch.randn(384))
            onednn_linear(torch.randn(12, length, 384), weight.t(), None)
signal.setitimer(signal.ITIMER_REAL, 0)
print("survived")
"""


def run(script: str, num_threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONFAULTHANDLER", None)
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="PyTorch starts no OpenMP workers on one core")
@pytest.mark.parametrize("script", [BUILD, FIRST_USE], ids=["build", "first use"])
def test_the_computing_thread_has_a_signal_stack_and_workers_take_no_signals(script):
    has_stack, child_has_stack, num_workers, *masks = run(REPORT + script, num_threads=2).split()
    assert (has_stack, child_has_stack) == ("True", "True")
    assert int(num_workers) >= 1  # PyTorch starts no more threads than there are cores
    # Bit n - 1 is signal n: SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM. glibc's own signals stay.
    wanted = sum(1 << number - 1 for number in (1, 2, 10, 12, 14, 15))
    assert all(int(mask, 16) & wanted == wanted for mask in masks), masks


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_thousand_signals_a_second_do_no_harm(num_threads):
    assert run(LOOP, num_threads) == "survived\n"
