"""How late an event loop runs what is due."""

from __future__ import annotations

import asyncio
from collections import deque

from aioinfer.histogram import SECONDS, Histogram

__all__ = ["LoopLag"]

_INTERVAL = 0.1  # seconds between two looks
_WATCHED_FOR = 120.0  # seconds after which nobody is said to watch any more
_RECENT = round(5.0 / _INTERVAL)


class LoopLag:
    """Sets a timer ten times a second, and sees how late it rings. It rings only while somebody watches.

    Timers of asyncio are exact to a millisecond: a lag below that is none.

    Loop thread only.

    Attributes:
        seconds: by which the timers were late.
    """

    def __init__(self) -> None:
        self.seconds = Histogram(SECONDS)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watched_until = 0.0

    @property
    def recent(self) -> float:
        """Seconds: the longest of the last five seconds in which it was watched."""
        return max(self._recent, default=0.0)

    def watch(self) -> None:
        """Look from now on, for two minutes, or until the next call of this."""
        loop = asyncio.get_running_loop()
        self._watched_until = loop.time() + _WATCHED_FOR
        if self._timer is None or loop is not self._loop:
            self._loop = loop
            self._wait(loop)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _INTERVAL
        self._timer = loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        lag = max(0.0, now - due)
        self.seconds.observe(lag)
        self._recent.append(lag)
        if now < self._watched_until:
            self._wait(loop)
        else:
            self._timer = None
