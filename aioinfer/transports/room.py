"""Callers that wait for room in a bounded queue: threads and tasks in one line, first come first served."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient
from aioinfer.errors import ServerOverloadedError
from aioinfer.transports.admission import REFUSALS
from aioinfer.wakers import LockWaker

__all__ = ["BoundedAsyncClient", "RoomQueue", "seconds_left"]

Listener = Callable[[], bool]
"""Wakes a caller, and says whether it could."""
T = TypeVar("T")


def seconds_left(deadline: float | None) -> float | None:
    """Seconds until a time on the clock of ``time.monotonic``; ``None`` if there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class RoomQueue:
    """Wakes as many waiting callers as there is room for.

    Any thread; what is shared is a deque, each change of which is one step. A caller that was woken must try again, and
    may find the room taken. One that goes away after it was woken passes its turn on, so that no room is left
    unannounced.

    Args:
        full: says whether the queue has no room now.
    """

    def __init__(self, full: Callable[[], bool]) -> None:
        self._full = full
        self._listeners: deque[Listener] = deque()

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._listeners)

    def announce(self, count: int | None = None) -> None:
        """Wake the ``count`` callers that have waited longest; all, if ``None``."""
        left = len(self._listeners) if count is None else count
        while left > 0:
            try:
                listener = self._listeners.popleft()
            except IndexError:
                return
            left -= listener()  # the turn of one whose event loop is closed goes to the next

    def put(self, put: Callable[[], T], deadline: float | None) -> T:
        """Call ``put`` until it finds room, and return what it returns.

        Raises:
            TimeoutError: there was no room until ``deadline``, on the clock of ``time.monotonic``.
        """
        turn: list[bool] = []  # has an element from when this caller is woken until it tries again
        try:
            while True:
                try:
                    return put()
                except ServerOverloadedError:
                    turn.clear()
                    self._wait(deadline, turn)
        except BaseException:
            if turn:
                self.announce(1)
            raise

    async def async_put(self, put: Callable[[], T]) -> T:
        """Do as :meth:`put`, without blocking the event loop."""
        turn: list[bool] = []  # has an element from when this caller is woken until it tries again
        try:
            while True:
                try:
                    return put()
                except ServerOverloadedError:
                    turn.clear()
                    await self._async_wait(turn)
        except BaseException:
            if turn:
                self.announce(1)
            raise

    def _wait(self, deadline: float | None, turn: list[bool]) -> None:
        """Block until there may be room."""
        woken = LockWaker()

        def listener() -> bool:
            woken.notify()
            return True

        try:
            self._listen(listener)
            if not woken.wait(seconds_left(deadline)):
                raise TimeoutError("there was no room in the queue of pending requests within the timeout")
            turn.append(True)
        except BaseException:
            self._leave(listener)
            raise

    async def _async_wait(self, turn: list[bool]) -> None:
        """Suspend until there may be room."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def listener() -> bool:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # that loop is closed
                return False
            return True

        try:
            self._listen(listener)
            await woken.wait()
            turn.append(True)
        except BaseException:
            self._leave(listener)
            raise

    def _listen(self, listener: Listener) -> None:
        self._listeners.append(listener)
        if not self._full():  # it may have become so before we were in line
            self.announce(1)

    def _leave(self, listener: Listener) -> None:
        try:
            self._listeners.remove(listener)
        except ValueError:  # it was woken already
            self.announce(1)


class BoundedAsyncClient(AsyncInferenceClient):
    """Base of awaitable clients whose requests are refused where they are put: all but how they are put."""

    @abstractmethod
    def _put(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        """Do as ``submit``; raise what the server refuses."""

    @property
    @abstractmethod
    def _room(self) -> RoomQueue:
        """Where callers wait for room."""

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        try:
            return self._put(td)
        except REFUSALS as error:
            refused: asyncio.Future[TensorDictBase] = asyncio.get_running_loop().create_future()
            refused.set_exception(error.with_traceback(None))
            return refused

    async def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:  # noqa: ASYNC109
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self(td, wait=wait)
        return await (await self._room.async_put(partial(self._put, td)) if wait else self._put(td))
