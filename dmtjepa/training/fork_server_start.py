"""Imported by the fork server alone, at its start: it ends with the process that started it."""

from dmtjepa.processes import die_with_parent

die_with_parent()
