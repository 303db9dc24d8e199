"""A client process's end of a wire: what it has asked, and how the answers find whoever waits."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from aioinfer.errors import PeerDiedError, ServerClosedError, own_error
from aioinfer.interaction import caller_mode, number_of
from aioinfer.transports.addresses import dial
from aioinfer.transports.control import Control, State
from aioinfer.transports.outlets import FUTURES, Outlet
from aioinfer.transports.parcels import pack, unpack, unpack_error
from aioinfer.transports.receivers import Asked, LoopDesk, Waiter
from aioinfer.transports.turns import Turns
from aioinfer.transports.wire import NUMBER, Frame, FromClient, FromServer, Wire, frame, word

__all__ = ["Station"]

_PATIENT = word(FromClient.PATIENT_REQUEST)


class Station(ABC):
    """One process's connection to a server, for a number of clients. It never blocks, except in ``wait``.

    Whoever waits reads, and settles what has come for others too: a blocked thread, one at a time; the event loops
    that wait; and a thread for futures, while there are any. Any thread: everything. ``_receiving`` is held while
    answers are read and settled, ``_lock`` guards what is asked before the server has taken this process in.

    Args:
        address: where the server listens.
        ticket: which clients it is for.
        count: how many they are.

    Raises:
        ServerClosedError: nobody listens there.
    """

    def __init__(self, address: str, ticket: bytes, count: int) -> None:
        self.calls: dict[int, tuple[Any, Outlet]] = {}
        """By number, what has no answer yet: its receiver, and the way there."""
        self.dead: Exception | None = None
        self.control: Control | None = None
        self._numbers = itertools.count()
        self._descriptors: list[int] = []
        self._early: list[Asked] | None = []  # what waits until this process is taken in
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._turns = Turns(self._read_here)
        self._desks: dict[asyncio.AbstractEventLoop, LoopDesk] = {}
        self._wire = Wire(dial(address))
        self._wire.send(frame(word(FromClient.JOIN), pack((ticket, count))))

    # -- what depends on the transport -----------------------------------------------------------------

    @abstractmethod
    def _welcome(self, news: Any, descriptors: Sequence[int]) -> None:
        """The server has taken this process in."""

    @abstractmethod
    def _load(self, asked: Sequence[Asked]) -> bytes:
        """Put requests where the server finds them, and return the frames that say so."""

    @abstractmethod
    def _unload(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[Any]:
        """The replies that came: each a TensorDict, or the error why it can't be one."""

    def _unload_one(self, number: int) -> Any:
        """The reply to one request that came without a payload."""
        return self._unload([number], [None])[0]

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, place: int, cargo: Any, receiver: Any, outlet: Outlet, *, patient: bool = False) -> Asked:
        """Note a request, which must be posted then.

        Args:
            place: which of the clients asks.
            cargo: what the transport makes of a request.
            receiver: who gets the answer.
            outlet: the way there.
            patient: whether it waits for room where the queue is full.

        Raises:
            ServerClosedError: the server is shut down.
            ServerPausedError: it refuses requests for now.
        """
        control = self.control
        if control is not None and control.view[0]:
            raise self._refusal(control)
        number = (next(self._numbers) & 0xFFFFFF) << 32 | place
        self.calls[number] = (receiver, outlet)
        return number, number | number_of(caller_mode()) << 56 | (_PATIENT if patient else 0), cargo

    def post(self, asked: Sequence[Asked]) -> None:
        """Send requests; fail those that the server does not look at any more."""
        if self._early is not None:
            with self._lock:
                if self._early is not None:
                    self._early += asked
                    asked = ()
        control = self.control
        if asked and (control is None or not control.view[0]):
            self._wire.send(self._load(asked))
        if control is not None and control.view[0]:
            for number, _, _ in asked:
                self._refuse(number, control)
        if self.dead is not None:
            self._fail_all(self.dead)

    def _refuse(self, number: int, control: Control) -> None:
        """Fail a request that the server may have got, or not, as it does not take any now."""
        call = self.calls.get(number)
        if call is not None and self.withdraw(number):
            call[1].fail([call[0]], [self._refusal(control)])

    def _refusal(self, control: Control) -> Exception:
        if control.view[0] == State.REFUSING:
            self.count_refusal()
        return control.refusal()

    def withdraw(self, number: int) -> bool:
        """Give a request up; say whether it had no answer yet."""
        if self.calls.pop(number, None) is None:
            return False
        self._wire.send(word(FromClient.CANCEL, number).to_bytes(8, sys.byteorder))
        return True

    def count_refusal(self) -> None:
        """Tell the server that a request was refused here."""
        self._wire.send(word(FromClient.REFUSED).to_bytes(8, sys.byteorder))

    # -- answers ---------------------------------------------------------------------------------------

    def receive(self, waiter: Waiter | None = None) -> None:
        """Read what has come, and settle it.

        Args:
            waiter: wait until something has come, unless it has its answer by now.
        """
        with self._receiving:
            self._receive(waiter)
        if self._wire.unsent:
            self._wire.flush()

    def _receive(self, waiter: Waiter | None, number: int = -1) -> None:
        """Under the lock: without it, another thread might read what ``waiter``, of a request, then waits for."""
        if waiter is not None and waiter.done:
            return
        try:
            if self.control is None:
                words: Sequence[int] = ()
                frames, descriptors = self._wire.receive_descriptors(4)
                self._descriptors += descriptors
            else:
                words, frames = self._wire.receive(block=waiter is not None)
        except EOFError:
            self._die()
            return
        if len(words) == 1 and words[0] == number and waiter is not None and self.calls.pop(number, None) is not None:
            waiter.settle(self._unload_one(number), None)
        elif words:
            self._hand_out(words, repeat(None))
        elif frames:
            self._handle(frames)

    def _handle(self, frames: Sequence[Frame]) -> None:
        numbers: list[int] = []
        payloads: list[bytes | None] = []
        for text, payload in frames:
            kind, number = text >> 60, text & NUMBER
            if kind == FromServer.REPLY:
                numbers.append(number)
                payloads.append(payload)
            elif kind == FromServer.WELCOME:
                self._welcome(unpack(payload or b""), self._descriptors)
                self._be_early_no_more()
            elif number == NUMBER:
                self._die(unpack_error(payload or b""))
            else:
                self._settle_error(number, unpack_error(payload or b""))
        if numbers:
            self._hand_out(numbers, payloads)

    def _hand_out(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> None:
        take = self.calls.pop
        calls = [take(number, None) for number in numbers]
        if None in calls:  # some were given up
            found = [one for one in zip(calls, numbers, payloads, strict=False) if one[0] is not None]
            calls, numbers, payloads = [one[0] for one in found], [one[1] for one in found], [one[2] for one in found]
            if not found:
                return
        receivers = [call[0] for call in calls if call is not None]
        outlets = [call[1] for call in calls if call is not None]
        try:
            replies = self._unload(numbers, payloads)
        except BaseException as error:  # also of a thread that is interrupted while it reads for others
            self._settle(receivers, outlets, [own_error(error) for _ in receivers])
            raise
        self._settle(receivers, outlets, replies)

    def _settle(self, receivers: Sequence[Any], outlets: Sequence[Outlet], replies: Sequence[Any]) -> None:
        first = outlets[0]
        if not any([outlet is not first for outlet in outlets]) and not any(map(_is_error, replies)):  # noqa: C419
            first.deliver(receivers, replies)
            return
        for receiver, outlet, reply in zip(receivers, outlets, replies, strict=True):
            if _is_error(reply):
                outlet.fail([receiver], [reply])
            else:
                outlet.deliver([receiver], [reply])

    def _settle_error(self, number: int, error: Exception) -> None:
        call = self.calls.pop(number, None)
        if call is not None:
            call[1].fail([call[0]], [error])

    def _be_early_no_more(self) -> None:
        with self._lock:
            early, self._early = self._early or [], None
        self.post([asked for asked in early if asked[0] in self.calls])

    def _die(self, error: Exception | None = None) -> None:
        """Fail everything: the other end is gone, or does not want this process."""
        if error is None and self.control is None:
            error = ServerClosedError("the server went away before it took this process in")
        elif error is None and self.control is not None and self.control.view[0]:
            error = self.control.refusal()
        self.dead = error or PeerDiedError("the server's process is gone")
        self._fail_all(self.dead)
        for desk in list(self._desks.values()):
            desk.close()

    def _fail_all(self, error: Exception) -> None:
        for number in list(self.calls):
            self._settle_error(number, own_error(error))

    # -- threads that wait -----------------------------------------------------------------------------

    def wait(self, number: int, waiter: Waiter, timeout: float | None) -> None:
        """Block until the waiter of a request has its answer, the station is dead, or ``timeout`` seconds passed."""
        if timeout is None and self._can_block() and self._receiving.acquire(blocking=False):
            try:  # most often, one thread waits alone: it needs no turns, and gets nothing but its reply
                while not waiter.done and self.dead is None and self._can_block():
                    self._receive(waiter, number)
            finally:
                self._receiving.release()
        if not waiter.done:
            self._turns.wait(waiter, timeout)

    def _can_block(self) -> bool:
        return self.control is not None and not self._wire.unsent

    def _read_here(self, waiter: Waiter, left: float | None) -> bool:
        """Block for up to ``left`` seconds until something has come, and settle it; say whether more can come."""
        if left is None and self._can_block():
            self.receive(waiter)
        elif self._wire.wait(left):
            self.receive()
        return self.dead is None

    # -- futures of threads ----------------------------------------------------------------------------

    def attend_futures(self) -> None:
        """See to it that a thread reads while futures wait."""
        self._turns.read_while(self._futures_wait)

    def _futures_wait(self) -> bool:
        return self.dead is None and any(outlet is FUTURES for _, outlet in list(self.calls.values()))

    # -- event loops -----------------------------------------------------------------------------------

    def desk(self) -> LoopDesk:
        """The desk of the running event loop."""
        loop = asyncio.get_running_loop()
        desk = self._desks.get(loop)
        if desk is None:
            for old in [old for old in self._desks if old.is_closed()]:
                del self._desks[old]
            desk = self._desks[loop] = LoopDesk(self, loop, self._wire)
        return desk

    def __del__(self) -> None:
        for desk in getattr(self, "_desks", {}).values():
            desk.close()


def _is_error(reply: Any) -> bool:
    return isinstance(reply, Exception)
