"""Command lines: how their help looks, and settings as `section.key=value` anywhere among their options."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

COMMAND_LINE = "the command line"
"""What messages call the source of its settings."""
USAGE = "any setting can follow as section.key=value, e.g. data.batch_size=64 logging.folder=runs/mine"


class HelpFormatter(argparse.HelpFormatter):
    """Wraps each paragraph of a text by itself, and keeps indented lines, which are commands to copy."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks: list[str] = []
        for paragraph in text.split("\n\n"):
            if any(line.startswith("  ") for line in paragraph.splitlines()):
                blocks.append(paragraph)
            else:
                blocks.append(textwrap.fill(" ".join(paragraph.split()), width))
        return "\n\n".join(blocks)


def describe_command(description: str, *examples: str, note: str = "") -> dict[str, Any]:
    """What a parser is made with so that all help reads alike: `ArgumentParser(prog=..., **describe_command(...))`.

    Args:
        examples: command lines to copy, shown below the options.
        note: shown before them.
    """
    epilog = "\n".join([f"example{'s' * (len(examples) > 1)}:", *(f"  {example}" for example in examples)])
    if note:
        epilog = f"{note}\n\n{epilog}"
    return {"description": description, "epilog": epilog, "formatter_class": HelpFormatter}


def add_settings(parser: argparse.ArgumentParser, *, as_option: bool, several: str = "") -> None:
    """Add the settings file to a command line, as `fname` of its result.

    Args:
        as_option: `--fname FILE` instead of `FILE`.
        several: what several of them mean; without it, there is one.
    """
    text = "settings file (YAML), or the name of settings that are part of the package, e.g. quickstart"
    values: dict[str, Any] = {"help": f"{text}; {several}" if several else text, "metavar": "SETTINGS"}
    if several:
        values["nargs"] = "+"
    if as_option:
        parser.add_argument("--fname", required=True, **values)
    else:
        parser.add_argument("fname", **values)


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, list_option: str
) -> argparse.Namespace:
    """Parse a command line; `overrides` of the result holds the settings in the order in which they were given.

    Args:
        arguments: None takes those of this process.
        list_option: the option that takes several values. A value with `=` is a setting: `--devices cpu data.x=8`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = parser.parse_known_args(given)
    values = getattr(options, list_option) or []
    setattr(options, list_option, [value for value in values if "=" not in value] or None)
    overrides += [value for value in values if "=" in value]
    wrong = [text for text in overrides if "=" not in text or text.startswith("-")]
    if wrong:
        parser.error(f"unknown arguments: {' '.join(wrong)}; {USAGE}")
    # argparse does not tell where an argument stood. The last place of a text decides.
    place = {text: index for index, text in enumerate(given)}
    options.overrides = sorted(overrides, key=lambda text: place.get(text, -1))
    return options
