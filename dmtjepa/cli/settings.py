"""`dmtjepa settings`: every setting, as a list, a page of documentation or a schema for editors."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command


def main(arguments: Sequence[str] | None = None, *, prog: str = "dmtjepa settings") -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            "List every setting: its values, its default and what it does.",
            "dmtjepa settings data",
            "dmtjepa settings --shipped",
        ),
    )
    parser.add_argument(
        "prefix", metavar="PREFIX", nargs="?", default="", help="only settings that begin so, e.g. data or mask.pack"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--markdown", action="store_true", help="as the page docs/settings.md")
    shape.add_argument("--json-schema", action="store_true", help="as a JSON schema, for editors of settings files")
    shape.add_argument("--shipped", action="store_true", help="list the settings files that are part of the package")
    options = parser.parse_args(arguments)
    return run_command(lambda: show(options))


def show(options: argparse.Namespace) -> int:
    """Print what the options ask for; returns the exit status."""
    from dmtjepa.config import Config, ConfigError, list_shipped
    from dmtjepa.config.documentation import list_settings, make_markdown

    if options.markdown:
        print(make_markdown(), end="")
    elif options.json_schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    elif options.shipped:
        print("\n".join(list_shipped()))
    else:
        lines = list_settings(options.prefix)
        if not lines:
            names = [line.split(" ", 1)[0] for line in list_settings() if not line.startswith(" ")]
            similar = difflib.get_close_matches(options.prefix, names, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"no setting begins with {options.prefix}{hint}")
        print("\n".join(lines))
    return 0
