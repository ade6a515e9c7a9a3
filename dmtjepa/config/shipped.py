"""Settings files that are part of the package, found by their name."""

from __future__ import annotations

import difflib
from pathlib import Path

from dmtjepa.config.errors import ConfigError
from dmtjepa.config.paths import expand_path

SHIPPED = Path(__file__).parents[1] / "configs"  # a link to the folder at the top of a checkout


def list_shipped() -> list[str]:
    """The names of the settings files in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_settings(name: str) -> Path:
    """A settings file: a path, or the name of a file in the package.

    A file of that name in the working folder comes before one in the package.

    Raises:
        ConfigError: there is no such name, or the path contains a variable that is not set. A path to a file that does
            not exist is returned: reading it tells what is wrong.
    """
    path = Path(expand_path(name, "the settings file"))
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    names = list_shipped()
    if name in names:
        return SHIPPED / f"{name}.yaml"
    similar = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    raise ConfigError(f"no settings file {name}, and none of that name in the package: {hint}It has {', '.join(names)}")
