"""How replies travel back inside one process: to the tasks of an event loop, and to futures.

For threads that block see ``sleepers``. The model thread calls ``deliver`` and ``fail``, once per batch and outlet.
They settle every receiver that is not settled yet, and raise nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tensordict import TensorDictBase

from aioinfer.futures import Future

__all__ = ["FUTURES", "LoopOutlet", "Outlet", "Receiver"]


class Receiver(Protocol):
    """Where one reply goes."""

    def done(self) -> bool:
        """Whether the reply is there, or nobody waits for it any more."""
        ...


class Outlet(Protocol):
    """A way back that many replies take at once."""

    def deliver(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        """Hand each receiver its reply."""
        ...

    def fail(self, receivers: Sequence[Any], errors: Sequence[Exception]) -> None:
        """Hand each receiver its error."""
        ...

    def drop(self, receiver: Any) -> None:
        """Take note that a cancelled request was taken out of the queue."""
        ...


class _Futures:
    """For ``client.submit`` from threads."""

    def deliver(self, receivers: Sequence[Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        for future, reply in zip(receivers, replies, strict=True):
            future.settle(reply, None)

    def fail(self, receivers: Sequence[Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        for future, error in zip(receivers, errors, strict=True):
            future.settle(None, error)

    def drop(self, receiver: Future[TensorDictBase]) -> None:
        pass


FUTURES = _Futures()


class LoopOutlet:
    """The way back to the tasks of one event loop: one wake-up per batch, however many replies.

    It also rings for the requests of its loop, once per tick and at its end, so that all of them get into
    the batch. From the delivery of a batch to the end of the tick in which its tasks run, the next
    batch is held back for what they are about to ask.

    Loop thread only: ``ring_at_end_of_tick``, ``_ringing``. Model thread, or who ends a request in its stead:
    ``deliver``, ``fail``, ``drop``.

    Args:
        loop: whose tasks.
        waking: has an element for each delivery that its receivers have not worked off.
        ring: tells the model thread that requests are pending.
    """

    __slots__ = ("__weakref__", "_ring", "_ringing", "_thread", "_waking", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, waking: list[bool], ring: Callable[[], None]) -> None:
        self.loop = loop
        self._waking = waking
        self._ring = ring
        self._ringing: list[bool] = []  # an element while the end of a tick is to come
        self._thread = threading.get_ident()

    def runs_here(self) -> bool:
        """Whether the caller runs on this loop, without the system call that ``get_running_loop`` makes up to 3.11."""
        return threading.get_ident() == self._thread and self.loop.is_running()

    def ring_at_end_of_tick(self) -> None:
        """Ring once, when every task that this tick wakes has run."""
        if not self._ringing:
            self._end_tick()

    def _end_tick(self) -> None:
        # The flag is lowered in C, and raised last: an interrupted callback must not keep later ones from being heard.
        self.loop.call_soon(self._ringing.clear)
        self.loop.call_soon(self._ring)
        self._ringing.append(True)

    def deliver(self, receivers: Sequence[asyncio.Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        self._call_soon(asyncio.Future.set_result, receivers, replies)

    def fail(self, receivers: Sequence[asyncio.Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._call_soon(asyncio.Future.set_exception, receivers, errors)

    def drop(self, receiver: asyncio.Future[TensorDictBase]) -> None:
        pass

    def _call_soon(self, *args: Any) -> None:
        self._waking.append(True)
        try:
            self.loop.call_soon_threadsafe(self._settle, *args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            self._awake()

    def _settle(
        self,
        settle: Callable[..., None],
        futures: Sequence[asyncio.Future[Any]],
        outcomes: Sequence[Any],
        interrupted: bool = False,
    ) -> None:
        try:
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    settle(future, outcome)
            self.loop.call_soon(self._awake)
            self._end_tick()  # after the tasks that were woken just now
        except BaseException:
            if not interrupted:  # by a signal handler: the others get their replies all the same
                self.loop.call_soon(self._settle, settle, futures, outcomes, True)
            raise

    def _awake(self) -> None:
        try:
            self._waking.pop()
        except IndexError:  # the model thread did not wait for it
            pass
