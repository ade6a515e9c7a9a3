"""Fixtures for small models."""

from tests.helpers.one_thread import _one_thread
