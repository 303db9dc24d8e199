"""Callers that wait for room in a bounded queue: threads and tasks in one line, first come first served."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable

from tensordict import TensorDictBase

from aioinfer.errors import ServerOverloadedError

__all__ = ["RoomQueue"]

Listener = Callable[[], None]


class RoomQueue:
    """Wakes as many waiting callers as there is room for.

    Any thread. A caller that was woken must try again, and may find the room taken. One that
    goes away after it was woken passes its turn on, so that no room is left unannounced.

    Args:
        full: says whether the queue has no room now.
    """

    def __init__(self, full: Callable[[], bool]) -> None:
        self._full = full
        self._lock = threading.Lock()
        self._listeners: deque[Listener] = deque()

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._listeners)

    def announce(self, count: int | None = None) -> None:
        """Wake the ``count`` callers that have waited longest; all, if ``None``."""
        with self._lock:
            count = len(self._listeners) if count is None else min(count, len(self._listeners))
            listeners = [self._listeners.popleft() for _ in range(count)]
        for listener in listeners:
            listener()

    def call(
        self, call: Callable[[TensorDictBase, float | None], TensorDictBase], td: TensorDictBase, timeout: float | None
    ) -> TensorDictBase:
        """Call until the queue has room for the request; ``timeout`` seconds for everything together.

        Raises:
            TimeoutError: there was no room, or no reply, within ``timeout``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                return call(td, left)
            except ServerOverloadedError:
                self._wait(left)

    async def async_call(
        self, submit: Callable[[TensorDictBase], Awaitable[TensorDictBase]], td: TensorDictBase
    ) -> TensorDictBase:
        """Submit until the queue has room for the request, and await the reply."""
        while True:
            try:
                reply = submit(td)
            except ServerOverloadedError:
                await self._async_wait()
            else:
                return await reply

    def _wait(self, timeout: float | None) -> None:
        """Block until there may be room.

        Raises:
            TimeoutError: there was none within ``timeout`` seconds.
        """
        woken = threading.Event()
        self._listen(woken.set)
        try:
            if not woken.wait(timeout):
                raise TimeoutError(f"no room in the queue of pending requests within {timeout} seconds")
        except BaseException:
            self._leave(woken.set)
            raise

    async def _async_wait(self) -> None:
        """Suspend until there may be room."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def listener() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # that loop is closed: its turn goes to the next
                self.announce(1)

        self._listen(listener)
        try:
            await woken.wait()
        except BaseException:
            self._leave(listener)
            raise

    def _listen(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)
        if not self._full():  # it may have become so before we were in line
            self.announce(1)

    def _leave(self, listener: Listener) -> None:
        try:
            with self._lock:
                self._listeners.remove(listener)
        except ValueError:  # it was woken already
            self.announce(1)
