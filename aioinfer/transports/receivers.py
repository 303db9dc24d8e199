"""Who waits for an answer in a client process: a thread that blocks, or the tasks of an event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Container, Sequence
from typing import Any, Protocol, TypeAlias

from tensordict import TensorDictBase

from aioinfer.transports.bells import LockBell
from aioinfer.transports.wire import Wire

__all__ = ["WAITERS", "Asked", "LoopDesk", "Waiter"]

Asked: TypeAlias = tuple[int, int, Any]
"""A request's number, the word that says it, and its cargo."""


class _Station(Protocol):
    @property
    def calls(self) -> Container[int]: ...

    def post(self, asked: Sequence[Asked]) -> None: ...

    def receive(self) -> None: ...


class Waiter:
    """A thread that blocks for one answer. Whoever reads it settles it."""

    __slots__ = ("bell", "done", "error", "gone", "reply")

    def __init__(self) -> None:
        self.done = False
        self.gone = False
        self.reply: TensorDictBase | None = None
        self.error: Exception | None = None
        self.bell: LockBell | None = None
        """Rings when the answer is there, or it is the thread's turn to read; made by the thread before it sleeps."""

    def settle(self, reply: TensorDictBase | None, error: Exception | None) -> None:
        """Leave the answer."""
        self.reply, self.error = reply, error
        self.done = True
        if self.bell is not None:
            self.bell.ring()

    def outcome(self) -> TensorDictBase:
        """The reply, which is there or about to come; or raise the error."""
        if not self.done:
            self.bell = self.bell or LockBell()
        while not self.done and self.bell is not None:
            self.bell.wait(None)
        if self.error is not None:
            error, self.error = self.error, None  # its traceback will lead here: it must not lead back
            try:
                raise error
            finally:
                del error
        assert self.reply is not None
        return self.reply


class _Waiters:
    """The way to them, and to threads that read for others."""

    def deliver(self, receivers: Sequence[Waiter], replies: Sequence[TensorDictBase]) -> None:
        for waiter, reply in zip(receivers, replies, strict=True):
            waiter.settle(reply, None)

    def fail(self, receivers: Sequence[Waiter], errors: Sequence[Exception]) -> None:
        for waiter, error in zip(receivers, errors, strict=True):
            waiter.settle(None, error)

    def drop(self, receiver: Waiter) -> None:
        pass


WAITERS = _Waiters()


class LoopDesk:
    """The way to the tasks of one event loop, which reads the wire itself.

    What its tasks ask within one tick leaves with one system call, at the end of it.

    Loop thread only: ``post_at_end_of_tick``. Any thread: the rest.

    Args:
        station: what reads, and keeps account of what was asked.
        loop: whose tasks; the one that runs.
        wire: that of the station.
    """

    def __init__(self, station: _Station, loop: asyncio.AbstractEventLoop, wire: Wire) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._wire = wire
        self._fd = wire.fileno()
        # The event loop must not keep the station of clients that are gone, but of those that still wait for replies.
        self._station = weakref.ref(station)
        self._kept: _Station | None = None
        self._asked: list[Asked] = []
        self._given_up = False
        self._waits_for_room = False
        loop.add_reader(self._fd, self._read)

    def runs_here(self) -> bool:
        """Whether the caller runs on this loop, without the system call that ``get_running_loop`` makes up to 3.11."""
        return threading.get_ident() == self._thread and self.loop.is_running()

    def post_at_end_of_tick(self, station: _Station, asked: Asked) -> None:
        """Post a request when every task that this tick wakes has run."""
        if not self._asked:
            self._kept = station
            self.loop.call_soon(self._post, station)
        self._asked.append(asked)

    def _post(self, station: _Station) -> None:
        asked, self._asked = self._asked, []
        if self._given_up:  # perhaps before it was posted
            self._given_up = False
            asked = [one for one in asked if one[0] in station.calls]
        station.post(asked)
        self._look_out()
        self.rest()

    def _read(self) -> None:
        station = self._station()
        if station is not None:
            station.receive()
            self._look_out()

    def _look_out(self) -> None:
        if self._wire.unsent and not self._waits_for_room:
            self._waits_for_room = True
            self.loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        self._wire.flush()
        if not self._wire.unsent:
            self._waits_for_room = False
            self.loop.remove_writer(self._fd)

    def rest(self) -> None:
        """Let go of the station, if nothing is under way."""
        if self._kept is not None and not self._kept.calls:
            self._kept = None

    def deliver(self, receivers: Sequence[asyncio.Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        self._settle(asyncio.Future.set_result, receivers, replies)

    def fail(self, receivers: Sequence[asyncio.Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._settle(asyncio.Future.set_exception, receivers, errors)

    def drop(self, receiver: asyncio.Future[TensorDictBase]) -> None:
        self._given_up = True
        self.rest()

    def _settle(self, settle: Any, receivers: Sequence[Any], outcomes: Sequence[Any]) -> None:
        if not self.runs_here():
            self._call_soon(self._settle_here, settle, receivers, outcomes)
        else:
            self._settle_here(settle, receivers, outcomes)

    def _settle_here(self, settle: Any, receivers: Sequence[Any], outcomes: Sequence[Any]) -> None:
        for future, outcome in zip(receivers, outcomes, strict=True):
            if not future.done():
                settle(future, outcome)
        self.rest()

    def _call_soon(self, *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(*args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            pass

    def close(self) -> None:
        """Read no more."""
        self._kept = None
        if self._wire.fileno() == -1:  # of a forked child: the loop was left behind
            return
        if self.runs_here():
            self._hang_up()
        else:
            self._call_soon(self._hang_up)

    def _hang_up(self) -> None:
        self.loop.remove_reader(self._fd)
        self.loop.remove_writer(self._fd)
