"""The base of all errors whose message is everything that a user needs."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: the message names what is wrong and what to do about it.

    Command lines print the message of a `UserError` without a traceback and exit with status 1.
    """
