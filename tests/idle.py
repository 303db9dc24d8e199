"""How much processor time threads take, which a loaded machine can only add to."""

from __future__ import annotations

import threading
import time

__all__ = ["use_nothing", "used_within"]


def used_within(seconds: float, threads: set[threading.Thread]) -> float:
    """The processor time that threads take meanwhile, in seconds."""
    before = sum(map(_seconds_of, threads))
    time.sleep(seconds)
    return sum(map(_seconds_of, threads)) - before


def use_nothing(threads: set[threading.Thread]) -> bool:
    """Whether threads take no processor time to speak of, once in a few looks."""
    return any(used_within(1.0, threads) < 0.002 for _ in range(3))


def _seconds_of(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
