"""Commands on fake GPUs, each in a process of its own: this process never sees them.

These tests are skipped where fake CUDA cannot be built or where there is a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dmtjepa.config import Config
from tests.helpers.runs import image_folder, settings, settings_in
from tools.fake_cuda.build import ROOT, Unavailable, build

HERE = Path(__file__).parent
HELPERS = ROOT / "tests" / "helpers"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, and (process, device) of the contexts that it made."""

    code: int
    output: str
    contexts: list[tuple[int, int]]


class Started:
    """A command that runs beside others, until its end is asked for."""

    def __init__(self, command: tuple, variables: dict[str, str], folder: Path) -> None:
        self._output, self._log = folder / "output", folder / "log"
        self._log.touch()
        environment = os.environ | variables | {"FAKE_CUDA_LOG": str(self._log)}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def end(self) -> Ended:
        """Wait for it."""
        code = self.process.wait(1800)  # only ends a hang
        rows = [line.split() for line in self._log.read_text().splitlines()]
        return Ended(code, self._output.read_text(), [(int(process), int(device)) for _, process, device, _ in rows])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()


@pytest.fixture(scope="session")
def start_on(tmp_path_factory) -> Callable[..., Started]:
    """start_on(sys.executable, "program.py", devices=2) -> the command, started on two GPUs; see `Started`."""
    try:
        variables_of_fake_cuda = build()
    except Unavailable as error:
        pytest.skip(f"fake CUDA: {error}")
    started = []
    caches = tmp_path_factory.mktemp("caches")  # kernels in them may be without machine code

    def start(*command: object, devices: int = 1, capability: int = 90, **variables: str) -> Started:
        variables |= {
            "FAKE_CUDA_DEVICES": str(devices),
            "FAKE_CUDA_CAPABILITY": str(capability),
            "OMP_NUM_THREADS": "1",
            "DISABLE_PTXAS_OPT": "1",  # Triton's kernels are compiled, but never run
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        variables["PYTHONPATH"] = str(ROOT)
        started.append(Started(command, variables_of_fake_cuda | variables, tmp_path_factory.mktemp("fake-cuda")))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def main_py(start_on, tmp_path) -> Callable[..., Ended]:
    """main_py(config, "cuda:0", devices=1) -> how main.py ended; the tiny network is known to it."""

    def run(config: Config, *names: str, program: Path = HELPERS / "tiny_main.py", **given) -> Ended:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return start_on(sys.executable, program, "--fname", path, "--devices", *names, **given).end()

    return run
