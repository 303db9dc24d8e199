"""Who waits for an answer in a client process: a thread that blocks, futures, or the tasks of an event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from tensordict import TensorDictBase

from aioinfer.futures import Future
from aioinfer.ipc.sockets import FramedSocket
from aioinfer.wakers import LockWaker

__all__ = ["WAITERS", "Asked", "FutureDesk", "LoopDesk", "Waiter"]

# Seconds for which the thread that reads for futures waits for more to do.
_LINGER = 0.25


Asked: TypeAlias = tuple[int, int, Any]
"""A request's number, the word that says it, and its cargo."""


class _Station(Protocol):
    @property
    def calls(self) -> dict[int, Any]: ...

    @property
    def dead(self) -> Exception | None: ...

    def post(self, asked: Sequence[Asked]) -> None: ...

    def receive(self) -> None: ...

    def flush(self) -> None: ...

    def wait(self, number: int, waiter: Waiter, timeout: float | None) -> None: ...

    def leave(self, number: int, waiter: Waiter) -> None: ...

    def desk_is_closed(self) -> None: ...


class Waiter:
    """A thread that blocks for one answer. Whoever reads it settles it; the first answer counts."""

    __slots__ = ("bell", "done", "error", "left", "reply")

    def __init__(self) -> None:
        self.done = False
        self.left = False
        """Whether the thread waits no more, and holds nothing that others wait for."""
        self.reply: TensorDictBase | None = None
        self.error: Exception | None = None
        self.bell: LockWaker | None = None
        """Rings when the answer is there, or it is the thread's turn to read; made by the thread before it sleeps."""

    def settle(self, reply: TensorDictBase | None, error: Exception | None) -> None:
        """Leave the answer."""
        if not self.done:
            self.reply, self.error = reply, error
            self.done = True
        if self.bell is not None:
            self.bell.notify()

    def outcome(self) -> TensorDictBase:
        """The reply, which is there; or raise the error."""
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

    def set_results(self, receivers: Sequence[Waiter], replies: Sequence[TensorDictBase]) -> None:
        for waiter, reply in zip(receivers, replies, strict=True):
            waiter.settle(reply, None)

    def set_exceptions(self, receivers: Sequence[Waiter], errors: Sequence[Exception]) -> None:
        for waiter, error in zip(receivers, errors, strict=True):
            waiter.settle(None, error)

    def answer(self, waiter: Waiter, answer: Any) -> None:
        """Hand one its reply, or its error."""
        if isinstance(answer, Exception):
            waiter.settle(None, answer)
        else:
            waiter.settle(answer, None)

    def discard(self, receiver: Waiter) -> None:
        pass


WAITERS = _Waiters()


class FutureDesk:
    """The way to futures of threads, and a thread that reads while there are any.

    Whoever reads the answer, this thread settles the future: so what a callback of it does blocks no thread that others
    need.

    Any thread: ``deliver``, ``fail``, ``drop``, ``attend``.

    Args:
        station: what reads.
    """

    def __init__(self, station: _Station) -> None:
        self._station = weakref.ref(station)
        self._answers: deque[tuple[Future[TensorDictBase], TensorDictBase | None, Exception | None]] = deque()
        self._waiter = Waiter()
        self._thread: dict[int, int] = {}  # who it is, if there is one

    def set_results(self, receivers: Sequence[Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        self._answers.extend([(future, reply, None) for future, reply in zip(receivers, replies, strict=True)])
        self._waiter.settle(None, None)
        self.attend()

    def set_exceptions(self, receivers: Sequence[Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._answers.extend([(future, None, error) for future, error in zip(receivers, errors, strict=True)])
        self._waiter.settle(None, None)
        self.attend()

    def discard(self, receiver: Future[TensorDictBase]) -> None:
        pass

    def attend(self) -> None:
        """See to it that the thread runs, until a while after the last future has its answer."""
        if not self._thread and (station := self._station()) is not None:
            threading.Thread(target=self._run, args=(station,), name="aioinfer-replies", daemon=True).start()

    def _run(self, station: _Station) -> None:
        me = threading.get_ident()
        while self._thread.setdefault(0, me) == me:
            try:
                while self._settle_some(station) or self._wanted(station):
                    pass
            finally:
                del self._thread[0]
            if not self._wanted(station):  # once more: who asked until now took it for granted that the thread runs
                return

    def _wanted(self, station: _Station) -> bool:
        if station.dead is not None:
            station.post(())  # it fails what is still noted, which whoever has said so does one by one
            return bool(self._answers)
        return bool(self._answers) or any(sink is self for _, sink in list(station.calls.values()))

    def _settle_some(self, station: _Station) -> bool:
        """Wait for answers, and settle their futures; say whether there were any."""
        self._waiter = waiter = Waiter()
        if not self._answers:
            try:
                station.wait(-1, waiter, _LINGER)
            finally:
                station.leave(-1, waiter)
        some = bool(self._answers)
        while self._answers:
            future, reply, error = self._answers.popleft()
            future.settle(reply, error)
            del future, reply, error
        return some


class LoopDesk:
    """The way to the tasks of one event loop, which reads the wire itself.

    What its tasks ask within one tick leaves with one system call, at the end of it.

    Loop thread only: ``post_at_end_of_tick``. Any thread: the rest.

    Args:
        station: what reads, and keeps account of what was asked.
        loop: whose tasks; the one that runs.
        wire: that of the station.
    """

    def __init__(self, station: _Station, loop: asyncio.AbstractEventLoop, wire: FramedSocket) -> None:
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
        self._closed = False
        self.attached = False
        """Whether the loop watches the wire; it must not be closed then."""

    def attach(self) -> None:
        """Read from now on: the wire is connected. Any thread."""
        if self._runs_in_this_thread():
            self._attach()
        else:
            self._call_soon(self._attach)

    def _attach(self) -> None:
        if not self._closed and not self.attached:
            self.attached = True
            self.loop.add_reader(self._fd, self._read)
            self._look_out()  # it may have sent before

    def _runs_in_this_thread(self) -> bool:
        """Whether nobody else runs the loop now."""
        return threading.get_ident() == self._thread and not self.loop.is_closed()

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
        try:
            station.post(asked)
            self._look_out()
        except BaseException:  # of a signal's handler: who else asked in this tick must not lose by it
            for one in asked:
                if one[0] in station.calls:
                    self.post_at_end_of_tick(station, one)
            raise
        self.rest()

    def _read(self) -> None:
        station = self._station()
        if station is not None:
            station.receive()
            self._look_out()

    def _look_out(self) -> None:
        if self._wire.unsent and not self._waits_for_room and self.attached:
            self._waits_for_room = True
            self.loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        station = self._station()
        if station is not None:
            station.flush()
        if not self._wire.unsent:
            self._waits_for_room = False
            self.loop.remove_writer(self._fd)

    def rest(self) -> None:
        """Let go of the station, if nothing is under way."""
        if self._kept is not None and not self._kept.calls:
            self._kept = None

    def set_results(
        self, receivers: Sequence[asyncio.Future[TensorDictBase]], replies: Sequence[TensorDictBase]
    ) -> None:
        self._settle(asyncio.Future.set_result, receivers, replies)

    def set_exceptions(self, receivers: Sequence[asyncio.Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._settle(asyncio.Future.set_exception, receivers, errors)

    def discard(self, receiver: asyncio.Future[TensorDictBase]) -> None:
        self._given_up = True
        self.rest()

    def _settle(self, settle: Any, receivers: Sequence[Any], outcomes: Sequence[Any]) -> None:
        if not self.runs_here():
            self._call_soon(self._settle_here, settle, receivers, outcomes)
        else:
            self._settle_here(settle, receivers, outcomes)

    def _settle_here(self, settle: Any, receivers: Sequence[Any], outcomes: Sequence[Any]) -> None:
        try:
            for future, outcome in zip(receivers, outcomes, strict=True):
                if not future.done():
                    settle(future, outcome)
        except BaseException:  # of a signal's handler: the others get theirs all the same
            self.loop.call_soon(self._settle_here, settle, receivers, outcomes)
            raise
        self.rest()

    def _call_soon(self, *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(*args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            pass

    def close(self) -> None:
        """Read no more. Any thread."""
        self._kept = None
        if self._wire.fileno() == -1:  # of a forked child: the loop was left behind
            self.attached = False
        elif self._runs_in_this_thread() or self.loop.is_closed():
            self._hang_up()
        else:
            self._call_soon(self._hang_up)

    def _hang_up(self) -> None:
        self._closed = True
        if self.attached and not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
            self.loop.remove_writer(self._fd)
        self.attached = False
        station = self._station()
        if station is not None:
            station.desk_is_closed()
