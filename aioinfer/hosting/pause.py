"""A stretch of time in which a server in another process runs no forward pass."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Self

from aioinfer.errors import ServerNotRunningError
from aioinfer.hosting.hotline import Call, Hotline
from aioinfer.hosting.orders import FromParent
from aioinfer.pause import PendingPolicy

__all__ = ["ProcessPause"]


class ProcessPause:
    """What ``ProcessInferenceServer.paused`` returns: use it with ``with``, or with ``async with``.

    A pause has the number of its command, and ends when the process is told so, or is told so before it could begin.
    Whatever interrupts a block, ``__exit__`` included, the pause ends with this object at the latest.

    Args:
        hotline: to the process.
        pending: what becomes of pending requests.
    """

    def __init__(self, hotline: Hotline, pending: PendingPolicy) -> None:
        self._hotline = hotline
        self._pending = pending
        self._begun: list[int] = []  # the numbers of what this object has paused, or may have

    def __enter__(self) -> Self:
        try:
            call = self._begin()
            call.wait_done()
            call.outcome()
            return self
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        resumed = self._end()
        if resumed is not None:
            resumed.wait_done()

    async def __aenter__(self) -> Self:
        try:
            call = self._begin()
            await call.await_done()
            call.outcome()
            return self
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        resumed = self._end()
        if resumed is not None:
            await resumed.await_done()

    def __del__(self) -> None:
        while hasattr(self, "_begun") and self._begun:
            self._end()

    def _begin(self) -> Call:
        call = self._hotline.new_call()
        self._begun.append(call.number)  # first: from now on it will be ended
        self._hotline.give(call, FromParent.PAUSE, self._pending)
        return call

    def _end(self) -> Call | None:
        """Have the latest pause ended; the answer comes when requests are taken again, or the process is gone."""
        resumed = None
        if self._begun:
            with suppress(ServerNotRunningError):  # in a forked child, which has nothing to end
                resumed = self._hotline.ask(FromParent.RESUME, self._begun[-1])
            del self._begun[-1]  # last: an exception of a signal handler until here leaves it to be ended again
        return resumed
