"""A client process's end of a wire: what it has asked, and how the answers find whoever waits."""

from __future__ import annotations

import asyncio
import itertools
import math
import select
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

from aioinfer.errors import PeerDiedError, ServerClosedError, own_error
from aioinfer.interaction import caller_mode, number_of
from aioinfer.transports.addresses import dial
from aioinfer.transports.control import Control
from aioinfer.transports.outlets import FUTURES, Outlet
from aioinfer.transports.parcels import pack, unpack, unpack_error
from aioinfer.transports.receivers import LoopDesk, Waiter
from aioinfer.transports.wire import NUMBER, Frame, FromClient, FromServer, Wire, frame, word

__all__ = ["Station"]

# Seconds for which the thread that reads for futures waits for the next one.
_LINGER = 1.0


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
        self._early: list[tuple[int, Any, int]] | None = []  # number, cargo, and text of what waits to be taken in
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._turn = threading.Lock()  # held by the thread that waits for the wire
        self._in_line: deque[Waiter] = deque()  # those that would have the next turn
        self._futures_thread: threading.Thread | None = None
        self._desks: dict[asyncio.AbstractEventLoop, LoopDesk] = {}
        self._wire = Wire(dial(address))
        self._poll = select.poll()
        self._poll.register(self._wire, select.POLLIN)
        self._polls_for_room = False
        self._wire.send(frame(word(FromClient.JOIN), pack((ticket, count))))

    # -- what depends on the transport -----------------------------------------------------------------

    @abstractmethod
    def _welcome(self, news: Any, descriptors: Sequence[int]) -> None:
        """The server has taken this process in."""

    @abstractmethod
    def _load(self, number: int, cargo: Any, text: int) -> bytes:
        """Put a request where the server finds it, and return the frame that says so."""

    @abstractmethod
    def _unload(self, numbers: Sequence[int], payloads: Sequence[bytes | None]) -> Sequence[Any]:
        """The replies that came: each a TensorDict, or the error why it can't be one."""

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, place: int, cargo: Any, receiver: Any, outlet: Outlet, *, patient: bool = False) -> tuple[int, bytes]:
        """Note a request, and return its number and the frame that must be posted for it.

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
            raise control.refusal()
        number = (next(self._numbers) & 0xFFFFFF) << 32 | place
        text = word(FromClient.PATIENT_REQUEST if patient else FromClient.REQUEST, number, number_of(caller_mode()))
        self.calls[number] = (receiver, outlet)
        if self._early is not None:
            with self._lock:
                if self._early is not None:
                    self._early.append((number, cargo, text))
                    return number, b""
        return number, self._load(number, cargo, text)

    def post(self, numbers: Sequence[int], data: bytes) -> None:
        """Send the frames of requests; fail those that the server does not look at any more."""
        self._wire.send(data)
        control = self.control
        if control is not None and control.view[0]:
            for number in numbers:
                self._settle_error(number, control.refusal())
        elif self.dead is not None:
            for number in numbers:
                self._settle_error(number, own_error(self.dead))

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

    def receive(self) -> None:
        """Read what has come, and settle it."""
        with self._receiving:
            try:
                if self.control is None:
                    frames, descriptors = self._wire.receive_descriptors(4)
                    self._descriptors += descriptors
                else:
                    frames = self._wire.receive()
            except EOFError:
                self._die()
                return
            self._handle(frames)
        if self._wire.unsent:
            self._wire.flush()

    def _handle(self, frames: Sequence[Frame]) -> None:
        calls = self.calls
        numbers, payloads, receivers, outlets = [], [], [], []
        for text, payload in frames:
            kind, number = text >> 60, text & NUMBER
            if kind == FromServer.REPLY:
                call = calls.pop(number, None)
                if call is not None:  # else the caller went away
                    numbers.append(number)
                    payloads.append(payload)
                    receivers.append(call[0])
                    outlets.append(call[1])
            elif kind == FromServer.WELCOME:
                self._welcome(unpack(payload or b""), self._descriptors)
                self._be_early_no_more()
            elif number == NUMBER:
                self._die(unpack_error(payload or b""))
            else:
                self._settle_error(number, unpack_error(payload or b""))
        if numbers:
            try:
                replies = self._unload(numbers, payloads)
            except BaseException as error:  # also of a thread that is interrupted while it reads for others
                self._settle(receivers, outlets, [own_error(error) for _ in numbers])
                raise
            self._settle(receivers, outlets, replies)

    def _settle(self, receivers: Sequence[Any], outlets: Sequence[Outlet], replies: Sequence[Any]) -> None:
        different = set(outlets)
        for outlet in different:
            own = list(zip(receivers, replies, strict=True))
            if len(different) > 1:
                own = [pair for pair, its in zip(own, outlets, strict=True) if its is outlet]
            good = [pair for pair in own if not isinstance(pair[1], Exception)]
            outlet.deliver([receiver for receiver, _ in good], [reply for _, reply in good])
            if len(good) < len(own):
                bad = [pair for pair in own if isinstance(pair[1], Exception)]
                outlet.fail([receiver for receiver, _ in bad], [error for _, error in bad])

    def _settle_error(self, number: int, error: Exception) -> None:
        call = self.calls.pop(number, None)
        if call is not None:
            call[1].fail([call[0]], [error])

    def _be_early_no_more(self) -> None:
        with self._lock:
            early, self._early = self._early or [], None
        here = [(number, self._load(number, cargo, text)) for number, cargo, text in early if number in self.calls]
        if here:
            self.post([number for number, _ in here], b"".join(data for _, data in here))

    def _die(self, error: Exception | None = None) -> None:
        """Fail everything: the other end is gone, or does not want this process."""
        if error is None and self.control is None:
            error = ServerClosedError("the server went away before it took this process in")
        elif error is None and self.control is not None and self.control.view[0]:
            error = self.control.refusal()
        self.dead = error or PeerDiedError("the server's process is gone")
        for number in list(self.calls):
            self._settle_error(number, own_error(self.dead))
        for desk in list(self._desks.values()):
            desk.close()

    # -- threads that wait -----------------------------------------------------------------------------

    def wait(self, waiter: Waiter, timeout: float | None) -> None:
        """Block until ``waiter`` has its answer, the station is dead, or ``timeout`` seconds passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        in_line = False
        try:
            while not waiter.done and self.dead is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                if self._turn.acquire(blocking=False):
                    try:
                        self._read_until(waiter, deadline)
                    finally:
                        self._turn.release()
                elif in_line:
                    waiter.bell.wait(left)
                    in_line = False
                else:  # first, and then once more for the turn: who has it passes it on to the line afterwards
                    self._in_line.append(waiter)
                    in_line = True
        finally:
            waiter.gone = True
            self._pass_turn()

    def _read_until(self, waiter: Waiter, deadline: float | None) -> None:
        while not waiter.done and self.dead is None:
            left = -1 if deadline is None else math.ceil((deadline - time.monotonic()) * 1000)
            if deadline is not None and left <= 0:
                return
            if self._wire.unsent != self._polls_for_room:
                self._polls_for_room = self._wire.unsent
                self._poll.modify(self._wire, select.POLLIN | select.POLLOUT * self._polls_for_room)
            if self._poll.poll(min(left, 2**31 - 1)):
                self.receive()

    def _pass_turn(self) -> None:
        while self._in_line and not self._turn.locked():
            try:
                waiter = self._in_line.popleft()
            except IndexError:
                return
            if not waiter.done and not waiter.gone:
                waiter.bell.ring()
                return

    # -- futures of threads ----------------------------------------------------------------------------

    def attend_futures(self) -> None:
        """See to it that a thread reads while futures wait."""
        with self._lock:
            if self._futures_thread is None:
                self._futures_thread = threading.Thread(
                    target=self._read_for_futures, name="aioinfer-replies", daemon=True
                )
                self._futures_thread.start()

    def _read_for_futures(self) -> None:
        while True:
            self.wait(Waiter(), _LINGER)
            with self._lock:
                waiting = any(outlet is FUTURES for _, outlet in list(self.calls.values()))
                if self.dead is not None or not waiting:
                    self._futures_thread = None
                    return

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
