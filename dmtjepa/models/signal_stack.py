"""Protect oneDNN kernels from signals.

While a oneDNN kernel for matrix products runs, its stack pointer points into a buffer on the heap. Linux writes the
frame of a signal below the stack pointer, so a signal that arrives at that moment overwrites heap memory that belongs
to something else. Two measures prevent this:

* The thread that computes gets an alternate signal stack. Python installs its handlers with `SA_ONSTACK`, so their
  frames are written there.
* OpenMP's worker threads block all signals. They have no alternate stack, and Linux delivers the signals of a process
  to any thread that does not block them.
"""

from __future__ import annotations

import ctypes
import signal
import sys

import torch

SS_DISABLE = 2
STACK_BYTES = 1 << 18  # a signal frame with all vector registers takes up to 12 KB

# The kernel keeps the address of each stack until its thread ends: the buffers are never freed.
_stacks: list[ctypes.Array[ctypes.c_char]] = []


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def protect_from_signals() -> None:
    """Let the calling thread and its OpenMP workers use oneDNN safely while signals arrive.

    Call this before the first parallel operation of a thread: existing workers keep their signal mask. If the thread
    already has an alternate signal stack, for example that of `faulthandler`, it is kept. Forked processes inherit both
    measures. Does nothing on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    _set_alternate_stack()
    if torch.get_num_threads() > 1:
        _start_workers()


def _set_alternate_stack() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    current = _Stack()
    if libc.sigaltstack(None, ctypes.byref(current)) or not current.flags & SS_DISABLE:
        return
    buffer = ctypes.create_string_buffer(STACK_BYTES)
    stack = _Stack(ctypes.addressof(buffer), 0, STACK_BYTES)
    if libc.sigaltstack(ctypes.byref(stack), None):
        raise OSError(ctypes.get_errno(), "cannot set an alternate signal stack")
    _stacks.append(buffer)


def _start_workers() -> None:
    """Start OpenMP's workers with all signals blocked. A thread inherits the mask of the thread that starts it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        torch.empty(1 << 17, device="cpu").fill_(0)  # PyTorch divides 2**15 elements and more among the workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
