"""Fixtures for short runs."""

from tests.helpers.one_thread import _one_thread
from tests.helpers.runs import (
    _fork_server,
    _program_server,
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
