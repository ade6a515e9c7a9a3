"""The error of settings that cannot be used."""

from __future__ import annotations

from dmtjepa.errors import UserError


class ConfigError(UserError, ValueError):
    """A settings file or override that cannot be used; the message names every key at fault and the remedy."""
