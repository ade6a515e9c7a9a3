"""The folder for files that can be created again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$DMTJEPA_CACHE, otherwise `dmtjepa` in $XDG_CACHE_HOME or ~/.cache.

    A user of a container can have no home: no $HOME and no entry in /etc/passwd. The folder is then a temporary one.
    """
    try:
        if "DMTJEPA_CACHE" in os.environ:
            return Path(os.environ["DMTJEPA_CACHE"]).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dmtjepa"
    except RuntimeError:  # "Could not determine home directory"
        return Path(tempfile.gettempdir()) / f"dmtjepa-{os.getuid()}"
