"""A client process's end of a connection: its pending calls, and the threads and event loops that read for them."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import copy as copy_of
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from tensordict import TensorDictBase
from torch import is_inference_mode_enabled

from aioinfer.errors import (
    ClientBusyError,
    ClientClosedError,
    InvalidRequestError,
    PeerDiedError,
    ServerClosedError,
    clone_exception,
)
from aioinfer.futures import Future
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
from aioinfer.transports.ipc.protocol import ANSWERED, CLIENT_INDEX, REFUSED, FromClient, FromServer, State, StatusPage
from aioinfer.transports.replies import LockWaker, ReplySink

if TYPE_CHECKING:
    from aioinfer.transports.ipc.client import ClientBase

__all__ = [
    "BLOCKING_CALLS",
    "BlockingCall",
    "ClientCodec",
    "ClientConnection",
    "FutureReader",
    "LoopReader",
    "OutgoingRequest",
    "client_closed",
]

_WAIT = header(FromClient.REQUEST_WAIT)
# Seconds after which a thread that reads sees that its client was closed, where others go on.
_WAKE_INTERVAL = 0.25
ENCODING_LIMIT = 1.0
"""Seconds that closing waits at most for other threads that encode requests."""
# Seconds for which the thread that reads for futures waits for more to do.
_IDLE_LIMIT = 0.25
# Seconds for which the end of the program waits at most for such threads, whose callbacks may block.
_EXIT_LIMIT = 2.0

OutgoingRequest: TypeAlias = tuple[int, int, Any]
"""A request's number, its header, and its payload as :meth:`ClientCodec.check` returned it."""


class ClientCodec(ABC):
    """What a client process makes of requests and replies.

    It pickles as long as it has not been ``accepted``. Each connection has a copy of its own.
    """

    exclusive = False
    """Whether each client has one request under way at most."""
    layouts = ""
    """What both ends must agree about."""
    waits_for_ack = True
    """Whether requests must not be sent before the server has accepted this process."""
    copies = True
    """Whether replies are copied out of the memory in which they came."""
    max_rows: int | None = None
    """How many rows a request may have at most."""
    answers: dict[int, TensorDictBase]
    """By number, replies to requests that ``encode`` has answered itself, instead of putting them anywhere."""

    def __init__(self) -> None:
        self.answers = {}

    def new(self, *, copy: bool | None = None) -> Self:
        """Another one of the same kind, for another connection or with another ``copies``."""
        other = copy_of(self)
        other.answers = {}
        if copy is not None:
            other.copies = copy
        return other

    @abstractmethod
    def accepted(self, ack: Any, descriptors: Sequence[int]) -> StatusPage:
        """The server has accepted this process.

        Args:
            ack: what it says.
            descriptors: what it shares; the caller closes them.
        """

    @abstractmethod
    def check(self, td: TensorDictBase) -> Any:
        """Return the payload of a request, as ``encode`` takes it.

        Raises:
            InvalidRequestError: the request can't be served.
        """

    @abstractmethod
    def encode(self, requests: Sequence[OutgoingRequest]) -> bytes:
        """Put requests where the server finds them, and return their frames."""

    @abstractmethod
    def decode(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[Any]:
        """The replies that came: each a TensorDict, or the error why it can't be one."""

    def decode_one(self, number: int) -> Any:
        """The reply to one request that came without a payload."""
        return self.decode([number], [None])[0]

    def close(self) -> None:  # noqa: B027 - most share nothing
        """Let go of what the server shares; views of it stay valid."""


Call: TypeAlias = tuple[Any, ReplySink]


class PendingCalls(dict[int, Call]):
    """By number, the receiver and the sink of each request without an answer.

    Any thread adds and takes out. ``complete`` is for one thread at a time, which may be interrupted anywhere by an
    exception of a signal handler: called again with the same answers, it goes on where it was. So a receiver may be
    settled twice, and takes the first answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._completing: tuple[list[Call | None], Sequence[Any]] | None = None  # taken out, and their answers

    def complete(
        self,
        numbers: Sequence[int],
        payloads: Iterable[Any],
        decode: Callable[[Sequence[int], Iterable[Any]], Sequence[Any]],
    ) -> None:
        """Settle calls with what ``decode`` makes of the payloads; answers to cancelled calls are dropped."""
        if not numbers:
            return
        if self._completing is None:
            self._completing = [], decode(numbers, payloads)
        taken, answers = self._completing
        if not taken:  # a client may ask again once its call is not here any more, and its answer must be read by then
            taken.extend(map(self.pop, numbers, repeat(None)))
        self._settle(taken, answers)
        self._completing = None

    @staticmethod
    def _settle(calls: Sequence[Call | None], answers: Sequence[Any]) -> None:
        """Hand each call its answer, all at once where they have one sink."""
        if all(calls) and not any(map(isinstance, answers, repeat(Exception))):
            receivers, sinks = zip(*calls, strict=True)
            if sinks.count(sinks[0]) == len(sinks):
                sinks[0].set_results(receivers, answers)
                return
        for call, answer in zip(calls, answers, strict=True):
            if call is None:  # it was cancelled
                continue
            receiver, sink = call
            if isinstance(answer, Exception):
                sink.set_exceptions([receiver], [answer])
            else:
                sink.set_results([receiver], [answer])

    def fail(self, number: int, error: Exception) -> None:
        """Settle one call with an error."""
        call = self.get(number)
        if call is not None:
            call[1].set_exceptions([call[0]], [error])
            self.pop(number, None)

    def succeed(self, number: int, reply: TensorDictBase) -> None:
        """Settle one call with its reply."""
        call = self.get(number)
        if call is not None:
            call[1].set_results([call[0]], [reply])
            self.pop(number, None)

    def fail_all(self, error: Exception) -> None:
        """Settle all calls, each with an error of its own."""
        for number in list(self):
            self.fail(number, clone_exception(error))


class BlockingCall:
    """A thread that blocks for one answer. The thread that reads the answer settles it; the first answer counts."""

    __slots__ = ("done", "error", "left", "reply", "waker")

    def __init__(self) -> None:
        self.done = False
        self.left = False
        """Whether the thread waits no more, and holds nothing that others wait for."""
        self.reply: TensorDictBase | None = None
        self.error: Exception | None = None
        self.waker: LockWaker | None = None
        """Wakes the thread for its answer, or for its turn to read; made by the thread before it sleeps."""

    def settle(self, reply: TensorDictBase | None, error: Exception | None) -> None:
        """Leave the answer."""
        if not self.done:
            self.reply, self.error = reply, error
            self.done = True
        if self.waker is not None:
            self.waker.notify()

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


class _BlockingCallSink(ReplySink):
    """The way back to blocked threads, and to threads that read for others."""

    def set_results(self, receivers: Sequence[BlockingCall], replies: Sequence[TensorDictBase]) -> None:
        for call, reply in zip(receivers, replies, strict=True):
            call.settle(reply, None)

    def set_exceptions(self, receivers: Sequence[BlockingCall], errors: Sequence[Exception]) -> None:
        for call, error in zip(receivers, errors, strict=True):
            call.settle(None, error)


BLOCKING_CALLS = _BlockingCallSink()


class LeaderFollowers:
    """Threads that wait for answers on one socket: the leader reads for all, and hands the lead to the first follower.

    Any thread. A thread may be interrupted anywhere by an exception of a signal handler; so there is no lock that
    it could keep. One atomic step of a dictionary makes a leader, and ``release`` may be called again after it was
    interrupted itself. The leader-followers pattern of Schmidt et al., "Pattern-Oriented Software Architecture", 2.
    """

    def __init__(self) -> None:
        self.leader: dict[int, Any] = {}
        """The leader as the only value: ``setdefault(0, me) is me`` takes the lead if it is free."""
        self._followers: deque[BlockingCall] = deque()

    def follow(self, call: BlockingCall) -> None:
        """Wait for the lead: ``call.waker`` tells when it may be free. Try to take it once more before waiting."""
        call.waker = call.waker or LockWaker()
        self._followers.append(call)

    def unfollow(self, call: BlockingCall) -> None:
        """Wait for the lead no more."""
        try:
            self._followers.remove(call)
        except ValueError:  # it did not follow
            pass

    def release(self, leader: Any) -> None:
        """Give the lead back, if ``leader`` has it; the first follower is woken if it is free."""
        if self.leader.get(0) is leader:
            del self.leader[0]
        if self._followers and not self.leader:
            try:
                waker = self._followers[0].waker
            except IndexError:  # nobody follows any more
                return
            if waker is not None:
                waker.notify()


class FutureReader(ReplySink):
    """The way back to futures of threads, and a thread that reads while there are any.

    Whichever thread reads the answer, this one settles the future: so a callback of it blocks no thread that others
    need.

    Any thread: ``set_results``, ``set_exceptions``, ``discard``, ``ensure_reading``.

    Args:
        connection: what it reads.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = weakref.ref(connection)
        self._answers: deque[tuple[Future[TensorDictBase], TensorDictBase | None, Exception | None]] = deque()
        self._call = BlockingCall()
        self._thread: dict[int, int] = {}  # its identifier, if there is one

    def set_results(self, receivers: Sequence[Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        self._answers.extend([(future, reply, None) for future, reply in zip(receivers, replies, strict=True)])
        self._call.settle(None, None)
        self.ensure_reading()

    def set_exceptions(self, receivers: Sequence[Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._answers.extend([(future, None, error) for future, error in zip(receivers, errors, strict=True)])
        self._call.settle(None, None)
        self.ensure_reading()

    def ensure_reading(self) -> None:
        """Start the thread unless it runs; it ends a while after the last future has its answer."""
        if not self._thread and (connection := self._connection()) is not None:
            thread = threading.Thread(target=self._run, args=(connection,), name="aioinfer-replies", daemon=True)
            _readers[thread] = self._connection
            thread.start()

    def _run(self, connection: ClientConnection) -> None:
        me = threading.get_ident()
        while self._thread.setdefault(0, me) == me:
            try:
                while self._settle_some(connection) or self._is_needed(connection):
                    pass
            finally:
                del self._thread[0]
            if not self._is_needed(
                connection
            ):  # once more: a caller until now took it for granted that the thread runs
                return

    def _is_needed(self, connection: ClientConnection) -> bool:
        if connection.dead is not None:
            connection.send(())  # it fails the calls that are left, which the thread that closes does one by one
            return bool(self._answers)
        return bool(self._answers) or any(sink is self for _, sink in list(connection.calls.values()))

    def _settle_some(self, connection: ClientConnection) -> bool:
        """Wait for answers, and settle their futures; return whether there were any."""
        self._call = call = BlockingCall()
        if not self._answers:
            try:
                connection.wait(-1, call, _IDLE_LIMIT)
            finally:
                connection.finish_wait(-1, call)
        some = bool(self._answers)
        while self._answers:
            future, reply, error = self._answers.popleft()
            future.settle(reply, error)
            del future, reply, error
        return some


# The threads of this process that read for futures.
_readers: weakref.WeakKeyDictionary[threading.Thread, weakref.ref[ClientConnection]] = weakref.WeakKeyDictionary()


def _end_readers() -> None:
    """End the threads before the interpreter does: one that frees tensors while that ends aborts the program."""
    running = list(_readers.items())
    for _, connection in running:
        if (one := connection()) is not None:
            one.close()
    deadline = time.monotonic() + _EXIT_LIMIT
    for thread, _ in running:
        thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_end_readers)
os.register_at_fork(after_in_child=_readers.clear)


class LoopReader:
    """The way back to the tasks of one event loop, which reads the socket itself.

    The requests that its tasks make within one tick leave with one system call, at the end of the tick.

    Loop thread only: ``send_at_end_of_tick``. Any thread: the rest.

    Args:
        connection: what it reads.
        loop: whose tasks; the one that runs.
        sock: of the connection.
    """

    def __init__(self, connection: ClientConnection, loop: asyncio.AbstractEventLoop, sock: FramedSocket) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._socket = sock
        self._fd = sock.fileno()
        # The event loop must not keep the connection of clients that are gone, but of those that wait for replies.
        self._connection = weakref.ref(connection)
        self._kept: ClientConnection | None = None
        self._outgoing: list[OutgoingRequest] = []
        self._some_cancelled = False
        self._watches_writable = False
        self._closed = False
        self.attached = False
        """Whether the loop watches the socket; it must not be closed then."""

    def attach(self) -> None:
        """Read from now on: the socket is connected. Any thread."""
        if self._is_own_thread():
            self._attach()
        else:
            self._call_soon(self._attach)

    def _attach(self) -> None:
        if not self._closed and not self.attached:
            self.attached = True
            self.loop.add_reader(self._fd, self._read)
            self._watch_if_unsent()  # it may have sent before

    def _is_own_thread(self) -> bool:
        """Whether no other thread runs the loop now."""
        return threading.get_ident() == self._thread and not self.loop.is_closed()

    def runs_here(self) -> bool:
        """Whether the caller runs on this loop, without the system call that ``get_running_loop`` makes up to 3.11."""
        return threading.get_ident() == self._thread and self.loop.is_running()

    def send_at_end_of_tick(self, connection: ClientConnection, request: OutgoingRequest) -> None:
        """Send a request when every task that this tick wakes has run."""
        if not self._outgoing:
            self._kept = connection
            self.loop.call_soon(self._send, connection)
        self._outgoing.append(request)

    def _send(self, connection: ClientConnection) -> None:
        requests, self._outgoing = self._outgoing, []
        if self._some_cancelled:  # perhaps before they were sent
            self._some_cancelled = False
            requests = [request for request in requests if request[0] in connection.calls]
        try:
            connection.send(requests)
            self._watch_if_unsent()
        except BaseException:  # of a signal handler: the other requests of this tick must not be lost
            for request in requests:
                if request[0] in connection.calls:
                    self.send_at_end_of_tick(connection, request)
            raise
        self.let_go()

    def _read(self) -> None:
        connection = self._connection()
        if connection is not None:
            connection.receive()
            self._watch_if_unsent()

    def _watch_if_unsent(self) -> None:
        if self._socket.unsent and not self._watches_writable and self.attached:
            self._watches_writable = True
            self.loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        connection = self._connection()
        if connection is not None:
            connection.flush()
        if not self._socket.unsent:
            self._watches_writable = False
            self.loop.remove_writer(self._fd)

    def let_go(self) -> None:
        """Keep the connection no more, if no request is under way."""
        if self._kept is not None and not self._kept.calls:
            self._kept = None

    def set_results(
        self, receivers: Sequence[asyncio.Future[TensorDictBase]], replies: Sequence[TensorDictBase]
    ) -> None:
        self._settle(asyncio.Future.set_result, receivers, replies)

    def set_exceptions(self, receivers: Sequence[asyncio.Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._settle(asyncio.Future.set_exception, receivers, errors)

    def discard(self, receiver: asyncio.Future[TensorDictBase]) -> None:
        self._some_cancelled = True
        self.let_go()

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
        except BaseException:  # of a signal handler: the others get theirs all the same
            self.loop.call_soon(self._settle_here, settle, receivers, outcomes)
            raise
        self.let_go()

    def _call_soon(self, *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(*args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            pass

    def close(self) -> None:
        """Read no more. Any thread."""
        self._kept = None
        if self._socket.fileno() == -1:  # of a forked child: the loop was left behind
            self.attached = False
        elif self._is_own_thread() or self.loop.is_closed():
            self._detach()
        else:
            self._call_soon(self._detach)

    def _detach(self) -> None:
        self._closed = True
        if self.attached and not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
            self.loop.remove_writer(self._fd)
        self.attached = False
        connection = self._connection()
        if connection is not None:
            connection.receive()  # which lets go of the socket, if this was the last loop


class ClientConnection:
    """One process's connection to a server, for a number of clients. It never blocks, except in ``wait``.

    A waiting caller reads, and settles what has come for others too: a blocked thread, one at a time; the event loops
    that wait; and a thread for futures, while there are any. Any thread: everything, but for methods that name the
    leader. ``_lock`` guards the requests that are made before the server has accepted this process.

    The main thread may be interrupted anywhere by an exception that a signal handler raises. What it holds is the
    lead; what it has read remains with the socket until it is confirmed. ``finish_wait`` settles what was read
    and releases the lead, and is called once more where it was interrupted itself.

    Args:
        address: where the server listens.
        endpoint_id: which clients it is for.
        count: how many they are.
        codec: of this connection alone.

    Raises:
        ServerClosedError: no server listens there.
        OSError: no descriptor is left.
    """

    def __init__(self, address: str, endpoint_id: bytes, count: int, codec: ClientCodec) -> None:
        self.calls = PendingCalls()
        self.dead: Exception | None = None
        self.status: StatusPage | None = None
        self.futures = FutureReader(self)
        self.numbers = itertools.count()
        """Of requests: those of a client are ``n << 32 | client_index``, of 56 bits."""
        self._codec = codec
        self._hello = frame(header(FromClient.HELLO), dumps((endpoint_id, count, codec.layouts)))
        self._descriptors: dict[int, None] = {}
        self._early: list[OutgoingRequest] | None = []  # requests that wait until this process is accepted
        self._sent_early = False  # and their refusal, if the server was closed meanwhile, is to come
        self._lock = threading.Lock()
        self._lead = LeaderFollowers()
        self._loop_readers: dict[asyncio.AbstractEventLoop, LoopReader] = {}
        self._connected = False
        self._encoding: set[tuple[int, object]] = set()  # threads that put requests where the server finds them
        self._alone = count == 1  # else a client may be closed without the connection
        self._raw_socket = unix_socket()
        self._socket = FramedSocket(self._raw_socket)
        try:
            if not self._alone:
                self._socket.set_receive_timeout(_WAKE_INTERVAL)
            if try_connect(self._raw_socket, address):
                self._say_hello()
            else:  # its backlog is full
                connector = object()
                self._lead.leader[0] = connector  # no thread reads before
                threading.Thread(
                    target=self._connect_later, args=(address, connector), name="aioinfer-connect", daemon=True
                ).start()
        except BaseException:
            self._socket.close()
            raise

    @property
    def unsent(self) -> bool:
        """Whether something waits until the server has read more; see :meth:`flush`."""
        return self._socket.unsent

    @property
    def has_reader(self) -> bool:
        """Whether a thread has the lead: it reads what comes, for all that wait, or it connects."""
        return bool(self._lead.leader)

    def _connect_later(self, address: str, connector: object) -> None:
        try:
            for delay in connect_delays():
                if self.dead is not None:
                    return
                if try_connect(self._raw_socket, address):
                    self._say_hello()
                    return
                time.sleep(delay)
        except Exception as error:
            self._fail(error)
        finally:
            self._end_lead(connector)

    def _say_hello(self) -> None:
        check_same_user(self._raw_socket)
        self._socket.send(self._hello)
        if not self._codec.waits_for_ack:
            self._send_early()
        self._connected = True
        for reader in list(self._loop_readers.values()):
            reader.attach()

    # -- requests --------------------------------------------------------------------------------------

    def prepare(
        self, client: ClientBase, number: int, payload: Any, receiver: Any, sink: ReplySink, wait: bool
    ) -> OutgoingRequest:
        """Note a call, whose request must be sent then.

        Args:
            client: whose request it is.
            number: its own.
            payload: as the codec returned it.
            receiver: takes the answer.
            sink: the way to the receiver.
            wait: whether it waits for space where the queue is full.

        Raises:
            ServerClosedError: the server is shut down.
            ServerPausedError: it refuses requests for now.
            ClientBusyError: the client has a request under way, and may not have two.
        """
        status, calls = self.status, self.calls
        if status is not None and (state := status.view[0]):
            self.receive()  # perhaps the server is gone, and another one listens there
            raise self._refusal(status, state) if self.dead is None else clone_exception(self.dead)
        if client.lock is None:
            calls[number] = receiver, sink
        else:
            with client.lock:
                call = calls.get(client.number)
                if call is not None and not _is_over(call[0]):
                    raise ClientBusyError(
                        "the client has a request under way; wait for its reply, cancel it, or make a client for each "
                        "caller"
                    )
                calls[number] = receiver, sink
                client.number = number
        mode = caller_mode()
        first = number if mode is INHERIT else number | mode_code(mode) << 56
        return number, first | _WAIT if wait else first, payload

    def send(self, requests: Sequence[OutgoingRequest]) -> None:
        """Send requests; fail those that the server does not look at any more."""
        if self._early is not None:
            with self._lock:
                if self._early is not None:
                    self._early += requests
                    requests = ()
        status = self.status
        taken = status is None or not status.view[0]
        if requests and taken:
            self._encode_and_send(requests)
        status = self.status  # once more: another thread may have read it meanwhile
        if status is not None and (state := status.view[0]) and not (taken and state == State.CLOSED):
            if taken:
                self.receive()  # it may have its answer
            for number, _, _ in requests:
                self._refuse(number, status, state, sent=taken)
        if self.dead is not None:
            self.calls.fail_all(self.dead)

    def _encode_and_send(self, requests: Sequence[OutgoingRequest]) -> None:
        """Send requests together, but for those that can't be encoded, which fail."""
        token = threading.get_ident(), object()
        try:
            self._encoding.add(token)
            if self.dead is not None:  # the memory may be another process's by now
                return
            try:
                data = self._codec.encode(requests)
            except BaseException:
                if self._send_one_by_one(requests):  # so it was of a signal handler, not of a request
                    raise
            else:
                self._socket.send(data)
            if self._codec.answers:
                self._settle_answers()
        finally:
            self._encoding.discard(token)
            if self.dead is not None:
                self._disconnect()
                self.receive()

    def _send_one_by_one(self, requests: Sequence[OutgoingRequest]) -> bool:
        """Send requests of which some may not be encodable, and fail; return whether all were."""
        all_were = True
        for request in requests:
            try:
                data = self._codec.encode([request])
            except BaseException as error:
                all_were = False
                refused = InvalidRequestError(f"the request can't be copied: {type(error).__qualname__}: {error}")
                refused.__cause__ = error
                self.count_rejection()
                self.calls.fail(request[0], refused)
            else:
                self._socket.send(data)
        return all_were

    def _settle_answers(self) -> None:
        """Settle the requests that the codec has answered."""
        answers = self._codec.answers
        for number in list(answers):
            reply = answers.pop(number, None)
            if reply is not None:
                self._say(FromClient.SETTLED_LOCALLY, ANSWERED)
                self.calls.succeed(number, reply)

    def _refuse(self, number: int, status: StatusPage, state: int, *, sent: bool = True) -> None:
        """Fail a request that the server may have got, or not, as it does not take any now; the server counts it."""
        if number in self.calls:
            if sent:
                self._say(FromClient.CANCEL, number)
                self.calls.fail(number, status.refusal(state))
            else:
                self.calls.fail(number, self._refusal(status, state))

    def _refusal(self, status: StatusPage, state: int) -> Exception:
        if state == State.PAUSED:
            self.count_rejection()
        return status.refusal(state)

    def cancel(self, number: int) -> None:
        """Withdraw a request, if it has no answer yet."""
        call = self.calls.get(number)
        if call is not None:
            self._say(FromClient.CANCEL, number)  # first: the client may write its next request afterwards
            self.calls.pop(number, None)
            call[1].discard(call[0])

    def close_client(self, client_index: int) -> None:
        """One of several clients was closed: fail what it has under way."""
        for number in list(self.calls):
            if number & CLIENT_INDEX == client_index:
                self._say(FromClient.CANCEL, number)
                self.calls.fail(number, client_closed())

    def count_rejection(self) -> None:
        """Tell the server that a request was refused here."""
        self._say(FromClient.SETTLED_LOCALLY, REFUSED)

    def _say(self, kind: FromClient, number: int = 0) -> None:
        if self._connected and self.dead is None:
            self._socket.send(header(kind, number).to_bytes(8, sys.byteorder))

    # -- replies ---------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what has come, and settle it, unless another thread does."""
        leader = object()
        try:
            try:
                if self._lead.leader.setdefault(0, leader) is leader:
                    self._receive(-1, None)
            finally:
                self._end_lead(leader)
        finally:
            self._end_lead(leader)  # again, for where the first was interrupted
        if self._socket.outbox:
            self.flush()

    def flush(self) -> None:
        """Send what was kept, as far as there is room; disconnect if the server reads no more.

        A server that has ended may leave requests unread that were sent in pieces. It has read what there was after
        it said so: so there was room for one more piece, and the thread that sends it finds the new state.
        """
        self._socket.flush()
        if self.status is not None and self.status.view[0] == State.ENDED:
            self._socket.shutdown()  # the thread that reads finds the replies that are there first, and then EOF

    def _end_lead(self, leader: object) -> None:
        """Settle what was read, if an exception of a signal handler came in between; and release the lead."""
        if self._lead.leader.get(0) is leader:
            if self.dead is None and self._socket.inbox[0]:
                self._receive(-1, None)
            if self.dead is not None and not self._encoding:
                self._release()
        self._lead.release(leader)

    def _receive(self, number: int, call: BlockingCall | None, block: bool = False) -> None:
        """Read and settle (leader).

        Args:
            number: of the leader's own request.
            call: the leader's own.
            block: wait until something has come.
        """
        if is_inference_mode_enabled():  # replies are kept by their callers, and some may be of callers outside of it
            with long_lived():
                self._receive(number, call, block)
            return
        sock = self._socket
        headers: Sequence[int] = ()
        frames: Sequence[Frame]
        rest: Rest | None
        try:
            if self.status is None:
                frames, rest = sock.peek_descriptors(self._descriptors)
            else:
                headers, frames, rest = sock.peek(block)
        except EOFError:
            self._fail()
            return
        except OSError as error:  # of descriptors
            self._fail(error)
            return
        if self.status is not None and (headers or frames):
            self.status.closings_seen = self.status.view[2]
        if call is not None and len(headers) == 1 and headers[0] == number:
            call.settle(self._codec.decode_one(number), None)
            self.calls.pop(number, None)
        elif call is not None and len(frames) == 1 and frames[0][0] == number:
            (answer,) = self._codec.decode((number,), (frames[0][1],))
            call.settle(*((None, answer) if isinstance(answer, Exception) else (answer, None)))
            self.calls.pop(number, None)
        elif headers or frames:
            try:
                self._settle(headers, frames)
            except BaseException:
                self._settle_again(headers, frames)
                if self.dead is None:  # so it was of a signal handler
                    raise
            if self.dead is not None:
                return
        if rest is None:
            sock.inbox[0].clear()
        else:
            sock.inbox = rest
        if self._sent_early:
            self._refuse_early()

    def _settle_again(self, headers: Sequence[int], frames: Sequence[Frame]) -> None:
        try:
            self._settle(headers, frames)
        except BaseException as error:
            self._fail(_unreadable(error))

    def _settle(self, headers: Sequence[int], frames: Sequence[Frame]) -> None:
        """Handle messages; called again with the same, go on where it was interrupted."""
        if headers:
            self.calls.complete(headers, repeat(None), self._codec.decode)
            return
        numbers: list[int] = []
        payloads: list[bytes] = []
        errors: set[int] = set()
        for first, payload in frames:
            kind, number, data = first >> 60, first & NUMBER, payload or b""
            if kind == FromServer.HELLO_ACK:
                if self.status is None:
                    self.status = self._codec.accepted(loads(data), list(self._descriptors))
                    self._close_descriptors()
                self._send_early()
            elif kind == FromServer.ERROR and number == NUMBER:
                self._fail(load_exception(data))
            else:
                if kind == FromServer.ERROR:
                    errors.add(number)
                numbers.append(number)
                payloads.append(data)
        self.calls.complete(numbers, payloads, partial(self._decode_some, errors) if errors else self._codec.decode)

    def _decode_some(self, errors: set[int], numbers: Sequence[int], payloads: Iterable[bytes]) -> Sequence[Any]:
        """Decode answers of which some are errors."""
        return [
            load_exception(payload) if number in errors else self._codec.decode([number], [payload])[0]
            for number, payload in zip(numbers, payloads, strict=True)
        ]

    def _send_early(self) -> None:
        with self._lock:
            # Where this is interrupted it is done again: a request that comes twice is answered once.
            if early := [request for request in self._early or () if request[0] in self.calls]:
                self._encode_and_send(early)
            self._early = None
        self._sent_early = True

    def _refuse_early(self) -> None:
        """Fail early requests that the server does not look at any more; it may have answered some before (leader)."""
        self._sent_early = False
        status = self.status
        if status is not None and (state := status.view[0]) not in (State.OPEN, State.CLOSED):
            try:
                self._receive(-1, None)
                for number in list(self.calls):
                    self._refuse(number, status, state)
            except BaseException:  # of a signal handler: the next leader does it
                self._sent_early = True
                raise

    # -- the end ---------------------------------------------------------------------------------------

    def _fail(self, error: Exception | None = None) -> None:
        """Fail everything: the server is gone, or does not accept this process, or this process closed its clients."""
        if error is None and self.status is None:
            error = ServerClosedError("the server went away before it took this process in")
        elif error is None and self.status is not None and self.status.has_closed:
            error = self.status.refusal(State.CLOSED)
        self.dead = self.dead or error or PeerDiedError("the server's process is gone")
        self._socket.shutdown()
        self.calls.fail_all(self.dead)
        for reader in list(self._loop_readers.values()):
            reader.close()

    def close(self) -> None:
        """Disconnect, and fail what is under way: the last client was closed. Any thread."""
        self.dead = self.dead or client_closed()
        here, deadline = threading.get_ident(), time.monotonic() + ENCODING_LIMIT
        while any(thread != here for thread, _ in list(self._encoding)) and time.monotonic() < deadline:
            time.sleep(ENCODING_LIMIT / 1000)  # so that what the clients had is free when this returns
        self._disconnect()  # the thread that reads now finds EOF, and releases the rest
        self.calls.fail_all(self.dead)
        self.receive()

    def _disconnect(self) -> None:
        """Shut the socket down, or leave that to the last thread that puts requests where the server finds them."""
        if not self._encoding:
            self._socket.shutdown()

    def _release(self) -> None:
        """Let go of everything, as soon as no event loop watches the socket (leader)."""
        assert self.dead is not None
        if self.calls:
            self._fail()
        self._close_descriptors()
        self._codec.close()
        if not any(reader.attached for reader in list(self._loop_readers.values())):
            self._socket.close()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[0])

    # -- threads that wait -----------------------------------------------------------------------------

    def wait(self, number: int, call: BlockingCall, timeout: float | None) -> None:
        """Block until a call has its answer, the connection is dead, or ``timeout`` seconds passed.

        ``finish_wait`` must be called then, whatever was raised.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        sock, leader = self._socket, self._lead.leader
        if sock.outbox:  # a thread that reads now does not look for room
            self._flush_all(call, deadline)
        left: float | None = None
        follows = False
        while not call.done and self.dead is None:
            if deadline is not None and (left := deadline - time.monotonic()) <= 0:
                return
            if leader.setdefault(0, call) is call:
                if left is None and self.status is not None and not sock.outbox:
                    self._receive(number, call, True)
                elif sock.wait(self._sleep_limit(left)):
                    self._receive(number, call)
                    if sock.outbox:
                        self.flush()
            elif follows and call.waker is not None:
                call.waker.wait(left)
            else:  # and then once more for the lead: a thread that releases it looks for followers afterwards
                self._lead.follow(call)
                follows = True

    def finish_wait(self, number: int, call: BlockingCall) -> None:
        """Wait no more; cancel the request if it has no answer. It may be called again if it was interrupted."""
        if call.waker is not None:
            self._lead.unfollow(call)
        if self.dead is None and not self._socket.inbox[0]:
            self._lead.release(call)
        else:
            self._end_lead(call)
        if not call.done:
            self.cancel(number)
        call.left = True

    def _flush_all(self, call: BlockingCall, deadline: float | None) -> None:
        """Send what is left to send, as the server reads; the leader may not look for room."""
        while self._socket.outbox and not call.done and self.dead is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            if self._socket.wait(self._sleep_limit(left)):
                self.receive()

    def _sleep_limit(self, left: float | None) -> float | None:
        """How many seconds a thread may sleep that others can't wake, of those that are left."""
        return left if self._alone else min(_WAKE_INTERVAL if left is None else left, _WAKE_INTERVAL)

    # -- event loops -----------------------------------------------------------------------------------

    def loop_reader(self) -> LoopReader:
        """The reader of the running event loop."""
        loop = asyncio.get_running_loop()
        reader = self._loop_readers.get(loop)
        if reader is None:
            for old in [old for old in self._loop_readers if old.is_closed()]:
                del self._loop_readers[old]
            reader = self._loop_readers[loop] = LoopReader(self, loop, self._socket)
            if self._connected:
                reader.attach()
        return reader

    def __del__(self) -> None:
        for reader in getattr(self, "_loop_readers", {}).values():
            reader.close()
        if hasattr(self, "_descriptors"):
            self._close_descriptors()


def _is_over(receiver: Any) -> bool:
    """Whether a call has its answer, though its number may still be noted."""
    return receiver.done if type(receiver) is BlockingCall else bool(receiver.done())


def client_closed() -> ClientClosedError:
    """Make the error for callers of a client that was closed."""
    return ClientClosedError("the client was closed; make another one")


def _unreadable(error: BaseException) -> PeerDiedError:
    named = PeerDiedError(
        f"hung up on the server, since what it says can't be handled: {type(error).__qualname__}: {error}"
    )
    named.__cause__ = error
    return named
