"""Every command in the documentation is one that the programs take: its options and its settings exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from dmtjepa.cli import submit, train
from dmtjepa.config import find_settings, load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
FENCED = re.compile(r"^```(?:console|bash|sh)?(?: [^\n]*)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:dmtjepa|python -m|python main(?:_distributed)?\.py|torchrun|make) \S+")
# Read by `python -m`, but not programs of the project.
FOREIGN = {"pytest", "pip", "venv", "mypy", "torch.distributed.run", "NAME"}


class Parsed(Exception):
    """A program has read its command line."""


def commands_of(text: str) -> list[str]:
    """The commands of a page: in blocks, and in a line of text where they have arguments."""
    blocks = [match[1] for match in FENCED.finditer(text)]
    blocks += [
        match[0] for match in INDENTED.finditer(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    ]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += [code for code in INLINE.findall(text) if len(code.split()) > 3 and "..." not in code]
    found = [line.strip().removeprefix("$ ").split(" #")[0] for line in lines]
    return [line for line in found if COMMAND.match(line)]


def read(command: str) -> None:
    """Let the program of a command read it. Raises SystemExit if it does not take it, Parsed if it does."""
    words = shlex.split(command.partition(" > ")[0])
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *arguments = words
    if program == "make":
        raise Parsed  # test_docs.py looks for the targets
    if program == "dmtjepa" and arguments[0] in ("train", "submit"):
        name, *arguments = arguments
        check_settings(name, arguments, prog=f"dmtjepa {name}")
    elif program == "python" and arguments[0].endswith(".py"):
        check_settings({"main.py": "train", "main_distributed.py": "submit"}[arguments[0]], arguments[1:], prog=None)
    elif program == "torchrun":
        start = arguments.index("-m")
        read(shlex.join(arguments[start + 1 :]))
    elif program == "dmtjepa":
        importlib.import_module("dmtjepa.cli").main(arguments)
    elif arguments[1:4] == ["tools.fake_cuda", "benchmarks/carry.sh", "run"]:  # which hands its options on
        read(shlex.join(["python", "-m", "benchmarks.gpu_check", *arguments[4:]]))
    elif arguments[1] == "tools.fake_cuda":
        read(shlex.join(arguments[2:]))
    else:
        _, name, *arguments = arguments
        package = {"dmtjepa.evaluation": "dmtjepa.cli.evaluate", "dmtjepa.interop": "dmtjepa.cli.weights"}
        name = "experiments.__main__" if name == "experiments" else package.get(name, name)
        # Those of tests/ change networks for the whole process, which other tests share.
        if name not in FOREIGN and not name.startswith("tests."):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, *arguments])
                importlib.import_module(name).main()


def check_settings(name: str, arguments: list[str], prog: str | None) -> None:
    options = {"train": train, "submit": submit}[name].parse_arguments(arguments, prog=prog)
    for fname in [options.fname] if isinstance(options.fname, str) else options.fname:
        load_config(find_settings(fname), options.overrides)
    raise Parsed


@pytest.fixture
def _reading_only(monkeypatch):
    """A parser that has read the arguments of a program raises Parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        options = parse(parser, arguments, namespace)
        if parser.prog == "dmtjepa" and set(vars(options)) == {"command"}:  # which reads the name of a command only
            return options
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_reading_only")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_programs_take_every_command(page, capsys):
    for command in commands_of(page.read_text()):
        try:
            read(command)
        except Parsed:
            continue
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_a_page_begins_with_a_command(page):
    """In a block, or after "made by"."""
    head = "\n".join(page.read_text().splitlines()[:20])
    assert re.search(r"^(```|    \S|`python )", head, re.MULTILINE)
