"""How every command ends: errors that the user can mend are printed without a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from dmtjepa.errors import UserError
from dmtjepa.output import protect_output


def run_command(
    work: Callable[[], int],
    *,
    errors: tuple[type[BaseException], ...] = (UserError,),
    interrupted: str = "interrupted",
) -> int:
    """Do the work of a command; returns its exit status, or 1 after an error and 130 after Ctrl-C.

    Args:
        errors: those whose message is everything that a user needs.
        interrupted: printed after Ctrl-C.
    """
    protect_output()
    try:
        return work()
    except errors as error:
        kind = type(error).__name__ if isinstance(error, UserError) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
