"""Ctrl-C while a command imports its libraries, and after its work. Main thread only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "end_at_interrupt", "ending_at_interrupt"]

INTERRUPTED = 128 + 2
"""The exit status that a shell reports for a program that SIGINT ended."""


def end_at_interrupt() -> None:
    """From now on, end the process with :data:`INTERRUPTED` at Ctrl-C, without an exception. Main thread only.

    A program that ignores Ctrl-C, or handles it in its own way, goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """Do as :func:`end_at_interrupt` inside a ``with`` block: for imports that take a while.

    A ``KeyboardInterrupt`` would pass through extension modules, which may turn it into an ``ImportError`` or drop it.
    """
    before = signal.getsignal(signal.SIGINT)
    end_at_interrupt()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, before)


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)
