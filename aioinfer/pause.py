"""A stretch of time in which a server runs no forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Literal, Self, TypeAlias

from aioinfer.errors import ServerClosedError

__all__ = ["Pause", "PendingPolicy"]

PendingPolicy: TypeAlias = Literal["keep", "wait", "reject"]


class Pause:
    """What ``InferenceServer.paused`` returns: use it with ``with``, or with ``async with``, once.

    Args:
        begin: asks for the pause; the future resolves when no forward pass runs any more.
        end: ends it, or the wish for it.
    """

    def __init__(self, begin: Callable[[], Future[None]], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end

    def __enter__(self) -> Self:
        begun = self._begin()
        try:
            begun.result()
        except CancelledError:
            self._end()
            raise _closed() from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    async def __aenter__(self) -> Self:
        begun = asyncio.wrap_future(self._begin())
        begun.add_done_callback(lambda future: future.cancelled() or future.exception())  # if nobody awaits it any more
        try:
            await asyncio.wait([begun])  # which does not cancel it: what has begun must be ended
            if begun.cancelled():
                raise _closed()
            begun.result()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()


def _closed() -> ServerClosedError:
    return ServerClosedError("the server was shut down before the pause began")
