"""The error of weights."""

from __future__ import annotations

from dmtjepa.errors import UserError


class WeightsError(UserError, ValueError):
    """Weights that cannot be read, or do not fit the model; the message says which and why."""
