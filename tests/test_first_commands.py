"""The first command of every page runs, in a folder of its own and with settings that make it small."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

import dmtjepa
from dmtjepa import cli
from dmtjepa.config import Config
from experiments import runner
from experiments.table import Table
from tests.helpers.run_folders import write_images

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FIRST = re.compile(
    r"^```(?:python|console|)\n(?P<block>.*?)^```$|^ {4}(?P<line>\S.*)$|`(?P<inline>python [^`\n]+)`",
    re.DOTALL | re.MULTILINE,
)
SHORT = {
    "optimization.epochs": 1,
    "optimization.warmup": 0,
    "data.batch_size": 8,
    "data.num_workers": 0,
    "data.loader": "pil",
}
TRAIN = tuple(f"{name}={value}" for name, value in SHORT.items())
EVALUATE = ("--quick",)


class Page(NamedTuple):
    """How the first command of a page is run here.

    printed: part of what it prints.
    replaced: what stands for something of the reader, or takes long, and what takes its place.
    added: options and settings that make it small.
    written: a file that it writes.
    reason: why only something close to it can be run.
    """

    printed: str
    replaced: Mapping[str, str] = MappingProxyType({})
    added: tuple[str, ...] = ()
    written: str | None = None
    reason: str | None = None


QUICKSTART = Page("next:", written="runs/quickstart/report/report.html")
COMMANDS = {
    "README": QUICKSTART,
    "cifar10": Page("", {"/datasets": "datasets"}, TRAIN, written="runs/cifar10_cpu/jepa-latest.pth.tar"),
    "cluster": Page("#SBATCH --gpus-per-node=8"),
    "container": Page(
        "24 images of 3 classes",
        {"docker build --tag dmtjepa .": "dmtjepa train small_images data.root_path=photos logging.folder=runs/photos"},
        (*TRAIN, "--dry-run"),
        reason="needs Docker: this is what the container runs, and tests/test_container.py reads the Dockerfile",
    ),
    "continue": Page("", added=TRAIN, written="runs/continued/jepa-latest.pth.tar"),
    "data": Page("data.mean="),
    "design": Page("24 images of 3 classes", added=(*TRAIN, "logging.folder=runs/new")),
    "differences": Page("passed", added=("-q", "-k", "feasibility"), reason="the other tests run by themselves"),
    "evaluation": Page("next:", added=EVALUATE, written="runs/quickstart/report/report.html"),
    "faults": Page("whole"),
    "experiments": Page(
        "[1/1]",
        {"IMAGES": "photos", "FOLDER": "out"},
        written="out/ijepa-seed0/result.json",
        reason="takes days: the first run alone",
    ),
    "first_hour": Page("data.mean="),
    "h200": Page("## Steps of the check", {"FILES": f"{ROOT}/benchmarks/results/nvidia-h200-2026-11-26-summary.json"}),
    "index": QUICKSTART,
    "performance": Page(
        "vs reference",
        {"vit_base:256": "vit_nano:2"},
        ("--steps=1", "--warmup=0", "--threads=1", "--set", "data.crop_size=96", "mask.min_keep=2"),
    ),
    "python": Page(
        "",
        {'{"data.root_path"': '{**SHORT, "data.root_path"', "evaluate(run)": "evaluate(run, quick=True)"},
        written="runs/mine/report/report.html",
    ),
    "reference": Page("load(source"),
    "settings": Page("", written="docs/settings.md"),
    "small_images": Page("data.mean=", {"PHOTOS": "photos"}),
    "training_figures": Page('"step": '),
    "versions": Page(
        ".venv-newest-python3.13/bin/python -m pytest",
        added=("--dry-run",),
        reason="installs an environment and runs all tests",
    ),
    "weights": Page("vit_nano"),
}


def first_command(page: Path) -> str:
    """The first command of a page, on one line; or its first block of Python."""
    match = FIRST.search(page.read_text())
    text = match["block"] or match["line"] or match["inline"]
    if match[0].startswith("```python"):
        return text
    line = re.sub(r"\\\n\s*", "", text).strip().splitlines()[0]
    return line.removeprefix("$ ").split(" #")[0].strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images and what commands read of a checkout."""
    folder = tmp_path_factory.mktemp("reader")
    for split, per_class in (("train", 8), ("val", 4)):
        write_images(folder / "photos" / split, per_class, seed=0)
    (folder / "datasets").mkdir()
    (folder / "datasets/cifar10").symlink_to(folder / "photos")
    (folder / "docs").mkdir()
    (folder / "runs").mkdir()
    (folder / "runs/first").symlink_to(folder / "runs/quickstart")
    for name in ("configs", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What commands have printed, for pages that begin with the same one."""
    return {}


def train_here(config: Config, devices: list[str]) -> int:
    """What `launch` does, without another process."""
    assert dmtjepa.train(config, device=devices[0]) == config.logging.path
    return 0


def call(program: str, arguments: list[str]) -> None:
    """Run a program of the project in this process, which has imported it."""
    if program == "dmtjepa":
        main = functools.partial(cli.main, arguments)
    elif arguments[0] == "-c":
        main = functools.partial(exec, arguments[1], {})
    elif arguments[0] == "-m":
        name = arguments[1]
        package = importlib.util.find_spec(name).submodule_search_locations is not None
        main = importlib.import_module(f"{name}.__main__" if package else name).main
        arguments = arguments[1:]
    else:
        main = importlib.import_module(arguments[0].removesuffix(".py")).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert not main()


def run_small(program: list[str]) -> None:
    """Run main.py or the evaluation, as another program starts them."""
    names = [word.removeprefix(f"{ROOT}/") for word in program[1:]]
    call("python", [*names, *(TRAIN if names[0] == "main.py" else EVALUATE)])


def run_make(arguments: list[str]) -> None:
    """Print what make would run, and run what is no set-up; with --dry-run, print alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=environment, text=True, timeout=600, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    print(done.stdout)
    if "--dry-run" not in arguments:
        for line in re.findall(r"^\S+/bin/python (?!-m compileall).*$", done.stdout, re.MULTILINE):
            run_small(shlex.split(line))


def run_command(command: str, added: tuple[str, ...]) -> None:
    """Run a command line. Raises an error if it fails."""
    if "\n" in command:
        exec(command, {"SHORT": SHORT})
        return
    command, _, file = command.partition(" > ")
    words = shlex.split(os.path.expandvars(command))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as redirected:
        while match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
            patch.setenv(match[1], match[2])
            del words[0]
        if file:
            output = redirected.enter_context(open(file, "w"))
            redirected.enter_context(contextlib.redirect_stdout(output))
        program, *arguments = [*words, *added]
        if program == "make":
            run_make(arguments)
        elif program == "tail":
            print(subprocess.run(words, text=True, timeout=600, check=True, stdout=subprocess.PIPE).stdout)
        elif arguments[:2] == ["-m", "pytest"]:
            subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=1200, check=True)
        else:
            call(program, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_first_command_runs(path, place, printed, monkeypatch, capfd):
    page, command = COMMANDS[path.stem], first_command(path)
    monkeypatch.chdir(place)
    monkeypatch.setenv("LOGS", str(place))
    monkeypatch.setattr("dmtjepa.data.build.find_shapes", lambda: place / "photos")
    monkeypatch.setattr("dmtjepa.training.launch.launch", train_here)
    # Of a table of experiments, the first run.
    monkeypatch.setattr(Table, "runs", lambda table, all_runs=Table.runs: all_runs(table)[:1])
    monkeypatch.setattr(runner, "call", lambda program, log: run_small(program) or 1.0)
    if "runs/" in command and not (place / "runs/quickstart").is_dir():  # the run that pages speak of
        run_command("make quickstart", ())
        capfd.readouterr()
    for before, after in page.replaced.items():
        assert before in command
        command = command.replace(before, after)
    if command not in printed:
        monkeypatch.setattr(
            logging.getLogger("c10d-NullHandler-dcp_logger"), "disabled", True
        )  # hundreds of lines for each save
        run_command(command, page.added)
        printed[command] = capfd.readouterr().out
    # Python 3.13 writes each parameter of a long function in a line of its own.
    assert page.printed in printed[command].replace("(\n    ", "(")
    assert page.written is None or (place / page.written).read_bytes()


@pytest.mark.slow
def test_a_run_is_measured_from_python(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setattr("dmtjepa.data.build.find_shapes", lambda: place / "photos")
    if not (place / "runs/quickstart").is_dir():
        run_command("make quickstart", ())
    capfd.readouterr()
    section = (ROOT / "docs/evaluation.md").read_text().split("## From Python\n")[1]
    exec(re.search(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[1].replace("images/", "photos/"), {})
    assert re.fullmatch(r"\{5: [\d.]+, 10: [\d.]+, 20: [\d.]+\}\n", capfd.readouterr().out)


def test_every_page_is_run():
    assert {path.stem for path in PAGES} == set(COMMANDS)
