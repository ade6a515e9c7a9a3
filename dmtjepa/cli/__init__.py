"""The command `dmtjepa`: training, evaluation, weights and data under one name.

Each command has a module with `main(arguments, prog)`. It imports what computes only after the command line is read: a
mistyped option is answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import dmtjepa
from dmtjepa.arguments import HelpFormatter


class Command(NamedTuple):
    """Where a command is, what it does, and the arguments that its module needs before those of the user."""

    module: str
    summary: str
    prefix: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train", "train on this machine"),
    "submit": Command("submit", "train on a SLURM cluster, as a job that requeues itself"),
    "evaluate": Command("evaluate", "measure a run and draw its figures"),
    "compare": Command("compare", "compare runs: their settings, results and curves"),
    "show": Command("weights", "print what a checkpoint holds", ("show",)),
    "export": Command("weights", "write weights for timm, Hugging Face, ONNX, ...", ("export",)),
    "verify": Command("weights", "compare a checkpoint with its manifest", ("verify",)),
    "check": Command("check", "read and decode every image of a data set"),
    "shards": Command("shards", "pack images into tar shards"),
    "settings": Command("settings", "list every setting: its type, range, default and meaning"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="dmtjepa",
        description="Pretrain vision transformers on unlabelled images with DMT-JEPA or I-JEPA.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
        + "\n\n`dmtjepa COMMAND --help` describes a command. To begin: dmtjepa train quickstart",
        formatter_class=HelpFormatter,
        usage="dmtjepa COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"dmtjepa {dmtjepa.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    if not given:
        parser.print_help()
        return 0
    name = parser.parse_args(given[:1]).command
    command = COMMANDS[name]
    module = importlib.import_module(f"dmtjepa.cli.{command.module}")
    prog = "dmtjepa" if command.prefix else f"dmtjepa {name}"
    return module.main([*command.prefix, *given[1:]], prog=prog)
