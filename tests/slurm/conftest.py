"""Fixtures for short runs."""

from tests.helpers.runs import (
    _fork_server,
    _one_thread,
    _quiet,
    image_folder,
    losses,
    settings,
    settings_in,
    weights,
)
