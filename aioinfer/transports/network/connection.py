"""A process's connection to a server elsewhere: its pending calls, and the thread that sends, reads and reconnects."""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import threading
import time
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aioinfer.errors import (
    ClientClosedError,
    InvalidRequestError,
    ModelError,
    PeerDiedError,
    ServerClosedError,
    clone_exception,
)
from aioinfer.futures import Future
from aioinfer.transports.network.errors import error_of
from aioinfer.transports.network.link import Address, Hello, Link, UnreachableError, open_link
from aioinfer.transports.network.messages import (
    Payload,
    columns_size,
    decode_group,
    decode_header,
    encode_message,
    group_payloads,
)
from aioinfer.transports.replies import ReplySink

__all__ = ["Call", "Connection", "client_closed", "connection_of"]

CONNECT_TIMEOUT = 10.0
"""Seconds until an attempt to connect has failed."""
FIRST_DELAY, LAST_DELAY = 0.05, 2.0
"""Seconds between attempts to connect, which double; each is up to half shorter, at random."""
_MESSAGE_BYTES = 2**20  # of tensors in a message of several requests
_CALL_BYTES = 1024  # that a call takes beside its tensors, more or less
MAX_BACKLOG = 256 * 2**20
"""Bytes of requests that may wait here, beyond which those that nobody awaits are refused."""
# Seconds for which the end of the program waits at most for the threads, which may run callbacks.
_EXIT_LIMIT = 2.0


class Call:
    """A request on its way.

    Args:
        payload: as ``check_payload`` returned it.
        size: bytes of its tensors.
        receiver: takes the answer.
        sink: the way to the receiver.
        owner: the number of the client.
        caller: who makes one request after the other; 0 if nobody does.
        mode: the name of the exploration mode.
        wait: whether it waits for space where the queue is full.
        timeout: seconds for which its caller waits.

    Attributes:
        number: once it is sent.
        over: whether nobody waits for the answer any more.
    """

    __slots__ = ("caller", "mode", "number", "over", "owner", "payload", "receiver", "sink", "size", "timeout", "wait")

    def __init__(
        self,
        payload: Payload,
        size: int,
        receiver: Any,
        sink: ReplySink,
        *,
        owner: int,
        caller: int,
        mode: str,
        wait: bool,
        timeout: float | None,
    ) -> None:
        self.payload = payload
        self.size = size
        self.receiver = receiver
        self.sink = sink
        self.owner = owner
        self.caller = caller
        self.mode = mode
        self.wait = wait
        self.timeout = timeout
        self.number = -1
        self.over = False


class Connection:
    """A connection to a server, for all clients of one process that ask it with one token.

    A thread with an event loop of its own sends, receives, and connects anew, so that no caller waits for another: a
    task whose loop is blocked keeps no thread from its reply. Where the connection is lost, the calls under way fail.
    A call that is made while there is none waits for the next attempt to connect, which comes within 0.05 seconds, and
    fails if that does. Without calls, attempts are made after longer and longer delays.

    Any thread: ``submit``, ``withdraw``, ``count_refusal``, ``opened``, ``close_client``, ``close``. The thread of the
    connection: everything else.

    Args:
        address: of the server.

    Attributes:
        closed: whether it is of no more use to this process.
        backlog: bytes of calls that are not sent yet.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.closed = False
        self.backlog = 0
        self.users: set[int] = set()
        """By identity: those who have not closed it. Guarded by the lock of the pool."""
        self.loop_sinks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        """Of event loops, by identity."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._waiting: OrderedDict[Call, None] = OrderedDict()
        self._calls: dict[int, Call] = {}  # by number: those that were sent
        self._number = 0  # of the next one
        self._cancelled: list[int] = []
        self._refused = 0
        self._openers: list[Future[Hello]] = []
        self._link: Link | None = None
        self._hello = Hello("", 0, 0)
        self._lost: Exception | None = None  # the last connection
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self.thread = threading.Thread(target=self._run, name="aioinfer-network", daemon=True)
        self.thread.start()

    # -- any thread ------------------------------------------------------------------------------------

    def submit(self, calls: Sequence[Call]) -> None:
        """Send calls together, or fail them."""
        self._post(partial(self._take_in, calls))

    def withdraw(self, call: Call) -> None:
        """Nobody waits for the answer to a call any more."""
        call.over = True
        self._post(partial(self._cancel, call))

    def count_refusal(self) -> None:
        """Tell the server that a request was refused here, if it is there."""
        self._post(self._count_refusal)

    def opened(self) -> Future[Hello]:
        """Resolves when there is a connection, or fails with the next attempt to connect."""
        future: Future[Hello] = Future()
        self._post(partial(self._note_opener, future))
        return future

    def close_client(self, owner: int) -> None:
        """A client was closed: fail its calls."""
        self._post(partial(self._fail_client, owner))

    def close(self) -> None:
        """Fail all calls, disconnect, and end the thread. Idempotent."""
        self.closed = True
        self._post(self._stop)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        try:
            self._loop.call_soon_threadsafe(self._work)
        except RuntimeError:  # the loop is closed: what is left is to fail calls
            self._work()

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._keep_connected())
        self._work()

    async def _keep_connected(self) -> None:
        self._main = asyncio.current_task()
        attempts = 0
        try:
            while not self.closed:
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        link, self._hello = await open_link(self.address, self._receive, self._send)
                except Exception as error:
                    self._fail_attempt(error)
                    attempts += 1
                else:
                    opened_at = self._loop.time()
                    await self._use(link)
                    attempts = 0 if self._loop.time() - opened_at > LAST_DELAY else attempts + 1
                await self._pause(attempts)
        except asyncio.CancelledError:  # it is closed
            pass
        finally:
            self.closed = True
            open_one, self._link = self._link, None
            self._fail_all(client_closed())
            if open_one is not None:
                await open_one.close()

    async def _use(self, link: Link) -> None:
        """Send and receive until the connection is lost."""
        self._link, self._lost = link, None
        for opener in self._openers:
            opener.settle(self._hello, None)
        self._openers.clear()
        self._send()
        await asyncio.wait([link.lost])  # which a cancellation of this task does not cancel
        self._link, self._lost = None, link.error
        self._fail_all(link.error)

    def _fail_attempt(self, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            error = UnreachableError(f"{self.address.url} does not answer within {CONNECT_TIMEOUT:g} seconds")
        if isinstance(error, UnreachableError):
            died = isinstance(self._lost, PeerDiedError)
            error = (PeerDiedError if died else ServerClosedError)(str(error))
        self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        calls = [*self._calls.values(), *self._waiting]
        openers, self._openers = self._openers, []
        self._calls.clear()
        self._waiting.clear()
        self._cancelled.clear()
        self._refused = self.backlog = 0
        for opener in openers:
            opener.settle(None, clone_exception(error))
        self._fail(calls, error)

    @staticmethod
    def _fail(calls: Sequence[Call], error: Exception) -> None:
        by_sink: defaultdict[ReplySink, list[Any]] = defaultdict(list)
        for call in calls:
            if not call.over:
                by_sink[call.sink].append(call.receiver)
        for sink, receivers in by_sink.items():
            sink.set_exceptions(receivers, [clone_exception(error) for _ in receivers])

    async def _pause(self, attempts: int) -> None:
        """Wait before the next attempt to connect: no longer than the first delay if there is a call for it."""
        delay = min(FIRST_DELAY * 2.0**attempts, LAST_DELAY) * random.uniform(0.5, 1)
        least = min(delay, FIRST_DELAY)
        await asyncio.sleep(least)
        if not (self._waiting or self._openers):
            self._wanted.clear()
            try:
                await asyncio.wait_for(self._wanted.wait(), delay - least)
            except TimeoutError:
                pass

    def _work(self) -> None:
        """Do what other threads have asked for, and send what there is to send."""
        while self._inbox:
            try:
                action = self._inbox.popleft()
            except IndexError:  # another thread was quicker: the loop is closed
                return
            action()
        self._send()

    def _take_in(self, calls: Sequence[Call]) -> None:
        if self.closed:
            self._fail(calls, client_closed())
            return
        for call in calls:
            self._waiting[call] = None
            self.backlog += call.size + _CALL_BYTES
        self._wanted.set()

    def _cancel(self, call: Call) -> None:
        if self._calls.pop(call.number, None) is not None:
            self._cancelled.append(call.number)
        elif call in self._waiting:
            del self._waiting[call]
            self.backlog -= call.size + _CALL_BYTES

    def _count_refusal(self) -> None:
        if self._link is not None:
            self._refused += 1

    def _note_opener(self, future: Future[Hello]) -> None:
        if self._link is not None:
            future.settle(self._hello, None)
        elif self.closed:
            future.settle(None, client_closed())
        else:
            self._openers.append(future)
            self._wanted.set()

    def _fail_client(self, owner: int) -> None:
        calls = [call for call in (*self._calls.values(), *self._waiting) if call.owner == owner and not call.over]
        self._fail(calls, client_closed())
        for call in calls:
            call.over = True
            self._cancel(call)

    def _stop(self) -> None:
        if self._main is not None:
            self._main.cancel()

    # -- messages --------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Send what there is to send, as far as the network takes it and the server has room."""
        link = self._link
        while link is not None and link.writable:
            calls = self._next_calls()
            if not (calls or self._cancelled or self._refused):
                return
            self._send_message(link, calls)

    def _next_calls(self) -> list[Call]:
        calls: list[Call] = []
        size, space = 0, self._hello.max_pending - len(self._calls)
        while self._waiting and len(calls) < space and size < _MESSAGE_BYTES:
            call, _ = self._waiting.popitem(last=False)
            self.backlog -= call.size + _CALL_BYTES
            if not call.over:
                calls.append(call)
                size += call.size
        return calls

    def _send_message(self, link: Link, calls: Sequence[Call]) -> None:
        for call in calls:
            call.number = self._number
            self._number += 1
        header = {"cancelled": self._cancelled, "refused": self._refused}
        try:
            message = encode_message(header, _groups(calls))
        except Exception as error:  # it was changed since it was checked
            self._send_halves(link, calls, InvalidRequestError(f"the request does not travel: {error}"))
            return
        if len(message) > self._hello.max_message_size and calls:
            limit = self._hello.max_message_size
            too_large = InvalidRequestError(f"the request takes {len(message)} bytes, the server takes {limit}")
            self._send_halves(link, calls, too_large)
            return
        self._cancelled, self._refused = [], 0
        for call in calls:
            self._calls[call.number] = call
        link.send(message)

    def _send_halves(self, link: Link, calls: Sequence[Call], error: InvalidRequestError) -> None:
        """Send calls that can't be sent together in two messages; fail one that can't be sent at all."""
        if len(calls) == 1:
            self._refused += 1
            self._fail(calls, error)
        else:
            self._send_message(link, calls[: len(calls) // 2])
            self._send_message(link, calls[len(calls) // 2 :])

    def _receive(self, message: bytes) -> None:
        header, groups, position = decode_header(message)
        if "malformed" in header:
            raise InvalidRequestError(f"it does not understand this client: {header['malformed']}")
        for about in groups:
            try:
                replies, end = decode_group(about, message, position)
            except InvalidRequestError as error:
                unreadable = ModelError(f"the reply can't be read: {error}")
                self._fail([call for number in about["numbers"] if (call := self._calls.pop(number, None))], unreadable)
                end = position + columns_size(about)
            else:
                self._settle(about["numbers"], replies)
            position = end
        for number, *packed in header["errors"]:
            told = error_of(packed)
            call = self._calls.pop(number, None)
            if call is not None and not call.over:
                call.sink.set_exceptions([call.receiver], [told])
        self._send()  # the server has room again

    def _settle(self, numbers: Sequence[int], replies: Sequence[Any]) -> None:
        by_sink: defaultdict[ReplySink, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
        for number, reply in zip(numbers, replies, strict=True):
            call = self._calls.pop(number, None)
            if call is not None and not call.over:
                receivers, own = by_sink[call.sink]
                receivers.append(call.receiver)
                own.append(reply)
        for sink, (receivers, own) in by_sink.items():
            sink.set_results(receivers, own)

    def forget_parent(self) -> None:
        """In a forked child: the connection is the parent's."""
        self.closed = True
        if self._link is not None:
            self._link.forget_parent()


def _groups(calls: Sequence[Call]) -> list[tuple[dict[str, Any], Any]]:
    """The groups of a message, each with what is to be said of it."""
    alike: defaultdict[tuple[str, bool, float | None], list[Call]] = defaultdict(list)
    for call in calls:
        alike[call.mode, call.wait, call.timeout].append(call)
    groups: list[tuple[dict[str, Any], Any]] = []
    for (mode, wait, timeout), some in alike.items():
        for group in group_payloads([call.payload for call in some]):
            about = {
                "numbers": [some[index].number for index in group.indices],
                "callers": [some[index].caller for index in group.indices],
                "mode": mode,
                "wait": wait,
                "deadline": timeout,
            }
            groups.append((about, group))
    return groups


def client_closed() -> ClientClosedError:
    """Make the error for callers of a client that was closed."""
    return ClientClosedError("the client was closed; make another one")


# -- the connections of this process ---------------------------------------------------------------------------

_pool: dict[Address, Connection] = {}
_lock = threading.RLock()
_of_parent: list[Connection] = []


def connection_of(address: Address, user: object) -> Connection:
    """The connection of this process to a server, for a user who will :func:`release` it, or is forgotten."""
    with _lock:
        connection = _pool.get(address)
        if connection is not None:
            connection.users.add(id(user))  # first: the garbage collector may release the last other user at any line
        if connection is None or connection.closed:
            connection = _pool[address] = Connection(address)
            connection.users.add(id(user))
        weakref.finalize(user, _release, connection, id(user)).atexit = False
        return connection


def release(connection: Connection, user: object) -> None:
    """Use a connection no more; with its last user it is closed. Idempotent."""
    _release(connection, id(user))


def _release(connection: Connection, user: int) -> None:
    with _lock:
        connection.users.discard(user)
        if connection.users or connection.closed:
            return
        connection.closed = True
        if _pool.get(connection.address) is connection:
            del _pool[connection.address]
    connection.close()


def _forget_parent() -> None:
    global _lock
    _lock = threading.RLock()
    for connection in _pool.values():
        connection.forget_parent()
        _of_parent.append(connection)  # its event loop must not be collected: it seems to run
    _pool.clear()


def _close_all() -> None:
    """End the threads before the interpreter does: one that frees tensors while that ends aborts the program."""
    connections = list(_pool.values())
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + _EXIT_LIMIT
    for connection in connections:
        connection.thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_parent)
