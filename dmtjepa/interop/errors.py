"""The errors of weights."""

from __future__ import annotations

from collections.abc import Sequence

from dmtjepa.errors import UserError


class WeightsError(UserError, ValueError):
    """Weights that cannot be read, or do not fit the model; the message says which and why."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package that only some users need is not installed.

    Args:
        purpose: what needs it, e.g. `export to ONNX`.
        packages: names by which pip installs them.
    """

    def __init__(self, purpose: str, packages: Sequence[str]) -> None:
        names = " ".join(packages)
        super().__init__(
            f"{purpose} needs packages that are not installed: pip install {names} (or this project with [export])"
        )
