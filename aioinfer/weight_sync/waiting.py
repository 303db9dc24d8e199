"""Wait until one of several descriptors is readable: blocking, or awaiting."""

from __future__ import annotations

import selectors
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol

import anyio.lowlevel

__all__ = ["Source", "async_wait_readable", "wait_readable"]


class Source(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


def wait_readable(sources: Sequence[Source], timeout: float | None) -> None:
    """Block until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early."""
    try:
        wait([source.fileno() for source in sources], timeout)
    except (OSError, ValueError):  # another thread has closed one
        pass


async def async_wait_readable(sources: Sequence[Source], timeout: float | None) -> None:  # noqa: ASYNC109 - as above
    """Suspend until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early."""
    selector: Any = selectors.DefaultSelector()  # its own descriptor is readable when one of them is
    with selector, anyio.move_on_after(timeout):
        try:
            for source in sources:
                selector.register(source.fileno(), selectors.EVENT_READ)
        except (OSError, ValueError):  # another thread has closed one
            await anyio.lowlevel.checkpoint()
            return
        await anyio.wait_readable(selector.fileno())
