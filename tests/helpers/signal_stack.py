"""Whether a thread can receive signals while oneDNN computes in it."""

import ctypes

from dmtjepa.models.signal_stack import SS_DISABLE, _Stack


def has_signal_stack() -> bool:
    """Whether the calling thread has an alternate signal stack."""
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return not stack.flags & SS_DISABLE
