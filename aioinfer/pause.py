"""A stretch of time in which a server runs no forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from aioinfer.errors import ServerClosedError

__all__ = ["Pause", "PendingPolicy", "check_policy"]

PendingPolicy: TypeAlias = Literal["keep", "wait", "reject"]


def check_policy(pending: str) -> None:
    """Raise :class:`ValueError` for anything but the three policies."""
    if pending not in ("keep", "wait", "reject"):
        raise ValueError(f'pending must be "keep", "wait" or "reject", got {pending!r}')


class Pause:
    """What ``paused`` returns: use it with ``with``, or with ``async with``, once.

    However the block is left, and wherever a signal handler raises, the pause is over: at the latest when nobody holds
    this object any more. (A handler that raises as ``__exit__`` is called keeps it from running.)

    Args:
        begin: asks for the pause; the future resolves when no forward pass runs any more.
        end: ends it, or the wish for it, also before ``begin`` was called; idempotent.
    """

    def __init__(self, begin: Callable[[], Future[Any]], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end
        self._begun = False

    def __enter__(self) -> Self:
        try:
            self._begun = True
            self._begin().result()
        except CancelledError:
            self._leave()
            raise _closed() from None
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    async def __aenter__(self) -> Self:
        try:
            self._begun = True
            begun = asyncio.wrap_future(self._begin())
            # If nobody awaits it any more.
            begun.add_done_callback(lambda future: future.cancelled() or future.exception())
            await asyncio.wait([begun])  # which does not cancel it: what has begun must be ended
            if begun.cancelled():
                raise _closed()
            begun.result()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._end()
        self._begun = False

    def __del__(self) -> None:
        if self._begun:
            self._end()


def _closed() -> ServerClosedError:
    return ServerClosedError("the server was shut down before the pause began")
