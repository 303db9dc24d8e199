"""A client process's end of a wire: what it has asked, and how the answers find whoever waits."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat
from typing import Any, Protocol

from torch import is_inference_mode_enabled

from aioinfer.errors import (
    ClientBusyError,
    ClientClosedError,
    InvalidRequestError,
    PeerDiedError,
    ServerClosedError,
    clone_exception,
)
from aioinfer.interaction_type import INHERIT, caller_mode, mode_code
from aioinfer.ipc.pickling import dumps, load_exception, loads
from aioinfer.ipc.sockets import (
    NUMBER,
    Frame,
    FramedSocket,
    Rest,
    check_same_user,
    connect_delays,
    frame,
    header,
    try_connect,
    unix_socket,
)
from aioinfer.modes import long_lived
from aioinfer.transports.calls import Calls
from aioinfer.transports.control import Control, FromClient, FromServer, State
from aioinfer.transports.receivers import WAITERS, Asked, FutureDesk, LoopDesk, Waiter
from aioinfer.transports.replies import ReplySink
from aioinfer.transports.turns import Turns

__all__ = ["Station"]

_PATIENT = header(FromClient.REQUEST_WAIT)
_PLACE = (1 << 32) - 1
# Seconds after which a thread that reads sees that its client was closed, where others go on.
_LOOK_UP = 0.25
# Seconds that closing waits at most for other threads that put requests where the server finds them.
_LOADED = 1.0


class Asking(Protocol):
    """What a station needs to know of a client."""

    claim: AbstractContextManager[object] | None
    """Held while it makes sure that it has no request under way, and notes the next; where it may have one only."""
    number: int
    """Of its last request, in that case."""


class Station(ABC):
    """One process's connection to a server, for a number of clients. It never blocks, except in ``wait``.

    Whoever waits reads, and settles what has come for others too: a blocked thread, one at a time; the event loops
    that wait; and a thread for futures, while there are any. Any thread: everything, but for what is said to be the
    leader's. ``_lock`` guards what is asked before the server has taken this process in.

    The main thread may be interrupted anywhere by an exception that a signal's handler raises. What it holds is the
    lead of ``_turns``; what it has read remains with the wire until it is confirmed. ``leave`` settles what was read
    and gives the lead back, and is called once more where it was interrupted itself.

    Args:
        address: where the server listens.
        ticket: which clients it is for.
        count: how many they are.
        layouts: what they take the requests and replies to look like.

    Raises:
        ServerClosedError: nobody listens there.
        OSError: no descriptor is left.
    """

    waits_for_welcome = True
    """Whether requests must not be sent before the server has taken this process in."""

    def __init__(self, address: str, ticket: bytes, count: int, layouts: str = "") -> None:
        self.calls = Calls()
        self.dead: Exception | None = None
        self.control: Control | None = None
        self.futures = FutureDesk(self)
        self.numbers = itertools.count()
        """Of requests: those of a client are ``n << 32 | place``, of 56 bits."""
        self._greeting = frame(header(FromClient.HELLO), dumps((ticket, count, layouts)))
        self._descriptors: dict[int, None] = {}
        self._early: list[Asked] | None = []  # what waits until this process is taken in
        self._lock = threading.Lock()
        self._turns = Turns()
        self._desks: dict[asyncio.AbstractEventLoop, LoopDesk] = {}
        self._connected = False
        self._loading: set[tuple[int, object]] = set()  # threads that put requests where the server finds them
        self._alone = count == 1  # else a client may be closed without the connection
        self._sock = unix_socket()
        self._wire = FramedSocket(self._sock)
        try:
            if not self._alone:
                self._wire.set_receive_timeout(_LOOK_UP)
            if try_connect(self._sock, address):
                self._join()
            else:  # its backlog is full
                dialler = object()
                self._turns.leader[0] = dialler  # nobody reads before
                threading.Thread(
                    target=self._dial, args=(address, dialler), name="aioinfer-connect", daemon=True
                ).start()
        except BaseException:
            self._wire.close()
            raise

    def _dial(self, address: str, dialler: object) -> None:
        try:
            for delay in connect_delays():
                if self.dead is not None:
                    return
                if try_connect(self._sock, address):
                    self._join()
                    return
                time.sleep(delay)
        except Exception as error:
            self._die(error)
        finally:
            self._end_turn(dialler)

    def _join(self) -> None:
        check_same_user(self._sock)
        self._wire.send(self._greeting)
        if not self.waits_for_welcome:
            self._be_early_no_more()
        self._connected = True
        for desk in list(self._desks.values()):
            desk.attach()

    # -- what depends on the transport -----------------------------------------------------------------

    @abstractmethod
    def _welcome(self, news: Any, descriptors: Sequence[int]) -> Control:
        """The server has taken this process in.

        Args:
            news: what it says.
            descriptors: what it shares; they belong to the station.
        """

    @abstractmethod
    def _load(self, asked: Sequence[Asked]) -> bytes:
        """Put requests where the server finds them, and return the frames that say so."""

    @abstractmethod
    def _unload(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[Any]:
        """The replies that came: each a TensorDict, or the error why it can't be one."""

    def _unload_one(self, number: int) -> Any:
        """The reply to one request that came without a payload."""
        return self._unload([number], [None])[0]

    def _release(self) -> None:  # noqa: B027 - to have nothing is right for some
        """Let go of what the server shares; views of it stay valid."""

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, client: Asking, number: int, cargo: Any, receiver: Any, sink: ReplySink, patient: bool) -> Asked:
        """Note a request, which must be posted then.

        Args:
            client: whose it is.
            number: its own.
            cargo: what the transport makes of a request.
            receiver: who gets the answer.
            sink: the way there.
            patient: whether it waits for room where the queue is full.

        Raises:
            ServerClosedError: the server is shut down.
            ServerPausedError: it refuses requests for now.
            ClientBusyError: the client has a request under way, and may not have two.
        """
        control, calls = self.control, self.calls
        if control is not None and (state := control.view[0]):
            self.receive()  # perhaps it is gone, and another one listens there
            raise self._refusal(control, state) if self.dead is None else clone_exception(self.dead)
        if client.claim is None:
            calls[number] = receiver, sink
        else:
            with client.claim:
                call = calls.get(client.number)
                if call is not None and not _is_over(call[0]):
                    raise ClientBusyError(
                        "the client has a request under way; wait for its reply, cancel it, or make a client for each "
                        "caller"
                    )
                calls[number] = receiver, sink
                client.number = number
        mode = caller_mode()
        text = number if mode is INHERIT else number | mode_code(mode) << 56
        return number, text | _PATIENT if patient else text, cargo

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
            self._send(asked)
        control = self.control  # once more: another thread may have read it meanwhile
        if control is not None and (state := control.view[0]) and not (taken and state == State.CLOSED):
            if taken:
                self.receive()  # it may have its answer
            for number, _, _ in asked:
                self._refuse(number, control, state, sent=taken)
        if self.dead is not None:
            self.calls.fail_all(self.dead)

    def _send(self, asked: Sequence[Asked]) -> None:
        """Send requests together, but for those that don't let themselves be loaded, which fail."""
        token = threading.get_ident(), object()
        try:
            self._loading.add(token)
            if self.dead is not None:  # the memory may be another process's by now
                return
            try:
                data = self._load(asked)
            except BaseException:
                if self._send_one_by_one(asked):  # so it was of a signal's handler, not of a request
                    raise
            else:
                self._wire.send(data)
        finally:
            self._loading.discard(token)
            if self.dead is not None:
                self._hang_up()
                self.receive()

    def _send_one_by_one(self, asked: Sequence[Asked]) -> bool:
        """Send requests of which some may not let themselves be loaded, and fail; say whether all did."""
        all_did = True
        for one in asked:
            try:
                data = self._load([one])
            except BaseException as error:
                all_did = False
                refused = InvalidRequestError(f"the request can't be copied: {type(error).__qualname__}: {error}")
                refused.__cause__ = error
                self.count_refusal()
                self.calls.fail(one[0], refused)
            else:
                self._wire.send(data)
        return all_did

    def _refuse(self, number: int, control: Control, state: int, *, sent: bool = True) -> None:
        """Fail a request that the server may have got, or not, as it does not take any now; the server counts it."""
        if number in self.calls:
            if sent:
                self._say(FromClient.CANCEL, number)
                self.calls.fail(number, control.refusal(state))
            else:
                self.calls.fail(number, self._refusal(control, state))

    def _refusal(self, control: Control, state: int) -> Exception:
        if state == State.REFUSING:
            self.count_refusal()
        return control.refusal(state)

    def withdraw(self, number: int) -> None:
        """Give a request up, if it has no answer yet."""
        call = self.calls.get(number)
        if call is not None:
            self._say(FromClient.CANCEL, number)  # first: the client may write its next request afterwards
            self.calls.pop(number, None)
            call[1].discard(call[0])

    def close_client(self, place: int) -> None:
        """One of several clients was closed: fail what it has under way."""
        for number in list(self.calls):
            if number & _PLACE == place:
                self._say(FromClient.CANCEL, number)
                self.calls.fail(number, client_closed())

    def count_refusal(self) -> None:
        """Tell the server that a request was refused here."""
        self._say(FromClient.REFUSED)

    def _say(self, kind: FromClient, number: int = 0) -> None:
        if self._connected and self.dead is None:
            self._wire.send(header(kind, number).to_bytes(8, sys.byteorder))

    # -- answers ---------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what has come, and settle it, unless another thread does."""
        reader, turns = object(), self._turns
        try:
            try:
                if turns.leader.setdefault(0, reader) is reader:
                    self._receive(-1, None)
            finally:
                self._end_turn(reader)
        finally:
            self._end_turn(reader)  # again, for where the first was interrupted
        if self._wire.outbox:
            self.flush()

    def flush(self) -> None:
        """Send what was kept, as far as there is room; hang up if the server reads no more.

        A server that has ended may leave requests unread that were sent in pieces. It has read what there was after
        it said so: so there was room for one more piece, and whoever sends it finds the new state.
        """
        self._wire.flush()
        if self.control is not None and self.control.view[0] == State.ENDED:
            self._wire.shutdown()  # whoever reads finds the replies that are there first, and then the end

    def _end_turn(self, reader: object) -> None:
        """Settle what was read, if the lead was lost to an exception of a signal's handler; and give it back."""
        if self._turns.leader.get(0) is reader:
            if self.dead is None and self._wire.inbox[0]:
                self._receive(-1, None)
            if self.dead is not None and not self._loading:
                self._close_wire()
        self._turns.give_up(reader)

    def _receive(self, number: int, waiter: Waiter | None, block: bool = False) -> None:
        """Read and settle (leader).

        Args:
            number: of the leader's own request.
            waiter: of the same.
            block: wait until something has come.
        """
        if is_inference_mode_enabled():  # replies are kept by their callers, and some may be of callers outside of it
            with long_lived():
                self._receive(number, waiter, block)
            return
        wire = self._wire
        words: Sequence[int] = ()
        frames: Sequence[Frame]
        rest: Rest | None
        try:
            if self.control is None:
                frames, rest = wire.peek_descriptors(self._descriptors)
            else:
                words, frames, rest = wire.peek(block)
        except EOFError:
            self._die()
            return
        except OSError as error:  # of descriptors
            self._die(error)
            return
        if self.control is not None and (words or frames):
            self.control.closings_seen = self.control.view[2]
        if waiter is not None and len(words) == 1 and words[0] == number:
            waiter.settle(self._unload_one(number), None)
            self.calls.pop(number, None)
        elif waiter is not None and len(frames) == 1 and frames[0][0] == number:
            (answer,) = self._unload((number,), (frames[0][1],))
            WAITERS.answer(waiter, answer)
            self.calls.pop(number, None)
        elif words or frames:
            try:
                self._settle(words, frames)
            except BaseException:
                self._settle_once_more(words, frames)
                if self.dead is None:  # so it was of a signal's handler
                    raise
            if self.dead is not None:
                return
        if rest is None:
            wire.inbox[0].clear()
        else:
            wire.inbox = rest

    def _settle_once_more(self, words: Sequence[int], frames: Sequence[Frame]) -> None:
        try:
            self._settle(words, frames)
        except BaseException as error:
            self._die(_unreadable(error))

    def _settle(self, words: Sequence[int], frames: Sequence[Frame]) -> None:
        """Do what was said; called again with the same, go on where it was interrupted."""
        if words:
            self.calls.hand_out(words, repeat(None), self._unload)
            return
        numbers: list[int] = []
        payloads: list[bytes] = []
        errors: set[int] = set()
        for text, payload in frames:
            kind, number, data = text >> 60, text & NUMBER, payload or b""
            if kind == FromServer.HELLO_ACK:
                if self.control is None:
                    self.control = self._welcome(loads(data), list(self._descriptors))
                    self._close_descriptors()
                self._be_early_no_more()
            elif kind == FromServer.ERROR and number == NUMBER:
                self._die(load_exception(data))
            else:
                if kind == FromServer.ERROR:
                    errors.add(number)
                numbers.append(number)
                payloads.append(data)
        self.calls.hand_out(numbers, payloads, partial(self._unload_some, errors) if errors else self._unload)

    def _unload_some(self, errors: set[int], numbers: Sequence[int], payloads: Iterable[bytes]) -> Sequence[Any]:
        """Do as ``_unload`` where some of the answers are errors."""
        return [
            load_exception(payload) if number in errors else self._unload([number], [payload])[0]
            for number, payload in zip(numbers, payloads, strict=True)
        ]

    def _be_early_no_more(self) -> None:
        with self._lock:
            # Where this is interrupted it is done again: a request that comes twice is answered once.
            if early := [asked for asked in self._early or () if asked[0] in self.calls]:
                self._send(early)
            self._early = None
        control = self.control
        if control is not None and (state := control.view[0]) not in (State.OPEN, State.CLOSED):
            for number in list(self.calls):  # as if it had been seen when they were sent
                self._refuse(number, control, state)

    # -- the end ---------------------------------------------------------------------------------------

    def _die(self, error: Exception | None = None) -> None:
        """Fail everything: the other end is gone, or does not want this process, or this process closed its clients."""
        if error is None and self.control is None:
            error = ServerClosedError("the server went away before it took this process in")
        elif error is None and self.control is not None and self.control.has_closed:
            error = self.control.refusal(State.CLOSED)
        self.dead = self.dead or error or PeerDiedError("the server's process is gone")
        self._wire.shutdown()
        self.calls.fail_all(self.dead)
        for desk in list(self._desks.values()):
            desk.close()

    def close(self) -> None:
        """The last client was closed: hang up, and fail what is under way. Any thread."""
        self.dead = self.dead or client_closed()
        here, deadline = threading.get_ident(), time.monotonic() + _LOADED
        while any(thread != here for thread, _ in list(self._loading)) and time.monotonic() < deadline:
            time.sleep(_LOADED / 1000)  # so that what the clients had is free when this returns
        self._hang_up()  # who reads now finds the end, and lets go of the rest
        self.calls.fail_all(self.dead)
        self.receive()

    def _hang_up(self) -> None:
        """Hang up, or leave it to the last thread that puts requests where the server finds them."""
        if not self._loading:
            self._wire.shutdown()

    def desk_is_closed(self) -> None:
        """An event loop has let go of the wire."""
        self.receive()

    def _close_wire(self) -> None:
        """Let go of everything, as soon as no event loop watches the wire (leader)."""
        assert self.dead is not None
        if self.calls:
            self._die()
        self._close_descriptors()
        self._release()
        if not any(desk.attached for desk in list(self._desks.values())):
            self._wire.close()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[0])

    # -- threads that wait -----------------------------------------------------------------------------

    def wait(self, number: int, waiter: Waiter, timeout: float | None) -> None:
        """Block until the waiter of a request has its answer, the station is dead, or ``timeout`` seconds passed.

        ``leave`` must be called then, whatever was raised.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        wire, leader = self._wire, self._turns.leader
        if wire.outbox:  # whoever reads now does not look for room
            self._make_room(waiter, deadline)
        left: float | None = None
        in_line = False
        while not waiter.done and self.dead is None:
            if deadline is not None and (left := deadline - time.monotonic()) <= 0:
                return
            if leader.setdefault(0, waiter) is waiter:
                if left is None and self.control is not None and not wire.outbox:
                    self._receive(number, waiter, True)
                elif wire.wait(self._patience(left)):
                    self._receive(number, waiter)
                    if wire.outbox:
                        self.flush()
            elif in_line and waiter.bell is not None:
                waiter.bell.wait(left)
            else:  # and then once more for the lead: who leaves it looks at the line afterwards
                self._turns.line_up(waiter)
                in_line = True

    def leave(self, number: int, waiter: Waiter) -> None:
        """Wait no more; withdraw the request if it has no answer. It may be called again if it was interrupted."""
        if waiter.bell is not None:
            self._turns.step_out(waiter)
        if self.dead is None and not self._wire.inbox[0]:
            self._turns.give_up(waiter)
        else:
            self._end_turn(waiter)
        if not waiter.done:
            self.withdraw(number)
        waiter.left = True

    def _make_room(self, waiter: Waiter, deadline: float | None) -> None:
        """Send what is left to send, as the server reads; whoever leads may not look for room."""
        while self._wire.outbox and not waiter.done and self.dead is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            if self._wire.wait(self._patience(left)):
                self.receive()

    def _patience(self, left: float | None) -> float | None:
        """How many seconds a thread may sleep that others can't wake, of those that are left."""
        return left if self._alone else min(_LOOK_UP if left is None else left, _LOOK_UP)

    # -- event loops -----------------------------------------------------------------------------------

    def desk(self) -> LoopDesk:
        """The desk of the running event loop."""
        loop = asyncio.get_running_loop()
        desk = self._desks.get(loop)
        if desk is None:
            for old in [old for old in self._desks if old.is_closed()]:
                del self._desks[old]
            desk = self._desks[loop] = LoopDesk(self, loop, self._wire)
            if self._connected:
                desk.attach()
        return desk

    def __del__(self) -> None:
        for desk in getattr(self, "_desks", {}).values():
            desk.close()
        if hasattr(self, "_descriptors"):
            self._close_descriptors()


def _is_over(receiver: Any) -> bool:
    """Whether a call has its answer, though its number may still be noted."""
    return receiver.done if type(receiver) is Waiter else bool(receiver.done())


def client_closed() -> ClientClosedError:
    """Make the error for whoever uses a client that was closed."""
    return ClientClosedError("the client was closed; make another one")


def _unreadable(error: BaseException) -> PeerDiedError:
    named = PeerDiedError(
        f"hung up on the server, since what it says can't be handled: {type(error).__qualname__}: {error}"
    )
    named.__cause__ = error
    return named
