"""Errors of the evaluation."""

from __future__ import annotations

from dmtjepa.errors import UserError


class EvaluationError(UserError, ValueError):
    """Images or features that cannot be evaluated; the message says why and what to do."""


class EvaluationStopped(Exception):
    """A rank was asked to stop while the ranks evaluated. All of them raise this at the same exchange."""


class NotMeasuredError(Exception):
    """One measurement is impossible, the others are not; the message is the reason given in the report."""
