"""A step that takes milliseconds, and programs run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # plain pytest does not look for `benchmarks` in this folder
from benchmarks.workloads import Workload
from dmtjepa.training.distributed import World, process_group
from tests.helpers.images import image_folder

TINY = ("data.crop_size=96", "mask.min_keep=2", "meta.pred_depth=1", "meta.pred_emb_dim=16")


@pytest.fixture(scope="package", autouse=True)
def _on_a_cpu():
    """One thread, and no GPU: what a program chooses by default is then the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """Settings of a tiny step."""
    return TINY


@pytest.fixture
def world() -> World:
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        yield world


@pytest.fixture
def workload() -> Workload:
    return Workload("vit_nano", 2, TINY)


@pytest.fixture
def run_program(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[dict, str]]:
    """run_program(module, name, *options) -> (its JSON, what it printed); the program must succeed."""

    def run(module: ModuleType, name: str, *options: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, "--out", str(tmp_path)])
        module.main()
        (path,) = Path(tmp_path).glob(f"cpu-*-{name}.json")
        assert path.with_suffix(".png").stat().st_size > 1000
        return json.loads(path.read_text()), capsys.readouterr().out

    return run
