"""The short runs of tests/training, here too."""

from tests.training.conftest import (  # noqa: F401
    _fork_server,
    _one_thread,
    _quiet,
    losses,
    weights,
)
