"""Paths in settings and on the command line: `~`, `~user`, `$NAME` and `${NAME}` are replaced in all of them."""

from __future__ import annotations

import os
import re

from dmtjepa.config.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand_path(text: str, setting: str) -> str:
    """Replace `~` and environment variables in a path.

    Settings are kept as they are written and expanded when they are used: on another node, a variable can have another
    value.

    Args:
        text: the path as it is written.
        setting: what it belongs to, for the message, e.g. `data.root_path`.

    Raises:
        ConfigError: a variable is not set, or there is no such user.
    """
    unset = [name for pair in _VARIABLE.findall(text) for name in pair if name and name not in os.environ]
    if unset:
        example = f" ({setting}=PATH)" if "." in setting else ""
        raise ConfigError(
            f"{setting}: {text} contains ${unset[0]}, and the environment variable {unset[0]} is not set; set it, or "
            f"name the path itself{example}"
        )
    path = os.path.expanduser(os.path.expandvars(text))
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{setting}: {text} begins with {user}, and its home folder is not known; write ./{user} for "
                          "a folder of that name")  # fmt: skip
    return as_file_name(path)


def as_file_name(path: str) -> str:
    """A path as it opens a file: in a locale that is ASCII, Python knows a file by the name that its bytes have there.

    In other locales the path is returned as it is.
    """
    try:
        return os.fsdecode(path.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
        return path
