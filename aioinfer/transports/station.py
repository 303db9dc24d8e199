"""A client process's end of a wire: what it has asked, and how the answers find whoever waits."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from aioinfer.errors import PeerDiedError, ServerClosedError, own_error
from aioinfer.interaction import caller_mode, number_of
from aioinfer.transports.addresses import dial
from aioinfer.transports.calls import Calls
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
        layouts: what they take the requests and replies to look like.

    Raises:
        ServerClosedError: nobody listens there.
    """

    def __init__(self, address: str, ticket: bytes, count: int, layouts: str = "") -> None:
        self.calls = Calls()
        self.dead: Exception | None = None
        self.control: Control | None = None
        self._numbers = itertools.count()
        self._descriptors: list[int] = []
        self._early: list[Asked] | None = []  # what waits until this process is taken in
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._turns = Turns()
        self._desks: dict[asyncio.AbstractEventLoop, LoopDesk] = {}
        self._wire = Wire(dial(address))
        self._wire.send(frame(word(FromClient.JOIN), pack((ticket, count, layouts))))

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
        if control is not None and (state := control.view[0]):
            self.receive()  # perhaps it is gone, and another one listens there
            raise self._refusal(control, state) if self.dead is None else own_error(self.dead)
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
        taken = control is None or not control.view[0]
        if asked and taken:
            self._wire.send(self._load(asked))
        if control is not None and (state := control.view[0]) and not (taken and state == State.CLOSED):
            if taken:
                self.receive()  # it may have its answer
            for number, _, _ in asked:
                self._refuse(number, control, state)
        if self.dead is not None:
            self.calls.fail_all(self.dead)

    def _refuse(self, number: int, control: Control, state: int) -> None:
        """Fail a request that the server may have got, or not, as it does not take any now."""
        call = self.calls.pop(number, None)
        if call is not None:
            self._say(FromClient.CANCEL, number)
            call[1].fail([call[0]], [control.refusal(state)])  # the server counts it, refused or cancelled

    def _refusal(self, control: Control, state: int) -> Exception:
        if state == State.REFUSING:
            self.count_refusal()
        return control.refusal(state)

    def withdraw(self, number: int) -> bool:
        """Give a request up; say whether it had no answer yet."""
        call = self.calls.pop(number, None)
        if call is None:
            return False
        call[1].drop(call[0])
        self._say(FromClient.CANCEL, number)
        return True

    def count_refusal(self) -> None:
        """Tell the server that a request was refused here."""
        self._say(FromClient.REFUSED)

    def _say(self, kind: FromClient, number: int = 0) -> None:
        self._wire.send(word(kind, number).to_bytes(8, sys.byteorder))

    # -- answers ---------------------------------------------------------------------------------------

    def receive(self, waiter: Waiter | None = None) -> None:
        """Read what has come, and settle it.

        Args:
            waiter: wait until something has come, unless it has its answer by now.
        """
        if self._receiving.acquire(blocking=waiter is not None):  # else another thread settles what is there
            try:
                self._receive(waiter)
            finally:
                self._receiving.release()
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
            self.calls.hand_out(words, repeat(None), self._unload)
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
                self.calls.fail(number, unpack_error(payload or b""))
        if numbers:
            self.calls.hand_out(numbers, payloads, self._unload)

    def _be_early_no_more(self) -> None:
        with self._lock:
            early, self._early = self._early, None
        control = self.control
        if early is not None:
            self.post([asked for asked in early if asked[0] in self.calls])
        elif control is not None and (state := control.view[0]) not in (State.OPEN, State.CLOSED):
            for number in list(self.calls):  # as if it had been seen when they were sent
                self._refuse(number, control, state)

    def _die(self, error: Exception | None = None) -> None:
        """Fail everything: the other end is gone, or does not want this process."""
        if error is None and self.control is None:
            error = ServerClosedError("the server went away before it took this process in")
        elif error is None and self.control is not None and self.control.view[0] >= State.CLOSED:
            error = self.control.refusal(self.control.view[0])
        self.dead = error or PeerDiedError("the server's process is gone")
        self.calls.fail_all(self.dead)
        for desk in list(self._desks.values()):
            desk.close()

    # -- threads that wait -----------------------------------------------------------------------------

    def wait(self, number: int, waiter: Waiter, timeout: float | None) -> None:
        """Block until the waiter of a request has its answer, the station is dead, or ``timeout`` seconds passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._wire.unsent:  # whoever reads now does not look for room
            self._make_room(waiter, deadline)
        if timeout is None and self._can_block() and self._turns.take():
            try:  # most often, one thread waits alone, and gets nothing but its reply
                with self._receiving:
                    while not waiter.done and self.dead is None and self._can_block():
                        self._receive(waiter, number)
            finally:
                self._turns.give_back()
        if not waiter.done:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._turns.wait(self._read_here, waiter, left)

    def _make_room(self, waiter: Waiter, deadline: float | None) -> None:
        """Send what is left to send, as the server reads."""
        while self._wire.unsent and not waiter.done and self.dead is None:
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not self._wire.wait_for_room(left):
                return
            self._wire.flush()

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
        self._turns.wait_while(self._futures_wait, self._wait_for_others)

    def _wait_for_others(self, seconds: float) -> None:
        self.wait(-1, Waiter(), seconds)

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
