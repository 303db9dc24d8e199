"""Wait until one of several descriptors is readable: blocking, or awaiting. Neither takes a descriptor to do so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Protocol

__all__ = ["Source", "await_readable", "wait_readable"]

_LONGEST = 3600.0  # seconds; the system calls take no more than some weeks


class Source(Protocol):
    """Anything with a descriptor. It must not be closed while somebody who refers to it waits for it."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


def wait_readable(sources: Sequence[Source], timeout: float | None) -> None:
    """Block until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early."""
    wait([source.fileno() for source in sources], _LONGEST if timeout is None else min(timeout, _LONGEST))


# By event loop and descriptor: who waits for it. A loop has one reader for a descriptor. Each entry belongs to its
# loop's thread.
_waiting: dict[tuple[asyncio.AbstractEventLoop, int], set[asyncio.Future[None]]] = {}


async def await_readable(sources: Sequence[Source], timeout: float | None) -> None:  # noqa: ASYNC109 - as above
    """Suspend until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early.

    Raises:
        OSError: the event loop can't watch them.
    """
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    watched: list[int] = []
    try:
        for source in sources:
            watched.append(fd := source.fileno())
            waiting = _waiting.setdefault((loop, fd), set())
            waiting.add(ready)
            if len(waiting) == 1:
                loop.add_reader(fd, _wake, waiting)
        await asyncio.wait([ready], timeout=timeout)
    finally:
        for fd in watched:
            waiting = _waiting[loop, fd]
            waiting.discard(ready)
            if not waiting:
                del _waiting[loop, fd]
                loop.remove_reader(fd)


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for ready in waiting:
        if not ready.done():
            ready.set_result(None)
