"""How often threads take turns: races are found sooner where they do so often."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["switch_interval"]


@contextmanager
def switch_interval(seconds: float) -> Iterator[None]:
    """Let a thread run for so long, inside a ``with`` block, before another one that waits may run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
