"""Fixtures for short runs."""

from tests.helpers.runs import (
    _fork_server,
    _one_thread,
    _quiet,
    _tiny_architecture,
    image_folder,
    losses,
    plain,
    settings,
    settings_in,
    start,
    weights,
)
