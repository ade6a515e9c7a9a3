"""Fixtures for short runs."""

from tests.helpers.one_thread import _one_thread
from tests.helpers.runs import (
    _fork_server,
    _quiet,
    image_folder,
    losses,
    settings,
    settings_in,
    weights,
)
