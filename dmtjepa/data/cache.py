"""The folder for files that can be created again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DMTJEPA_CACHE, else dmtjepa in $XDG_CACHE_HOME or ~/.cache."""
    if "DMTJEPA_CACHE" in os.environ:
        return Path(os.environ["DMTJEPA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dmtjepa"
