"""Clients of a server elsewhere: an endpoint pickles, and connects its process when a client of it is first used."""

from __future__ import annotations

import asyncio
import itertools
import math
import ssl
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient, check_count
from aioinfer.entries import RequestLike, check_entries, make_request
from aioinfer.errors import InvalidRequestError, ServerOverloadedError
from aioinfer.futures import Future
from aioinfer.interaction_type import caller_mode, mode_code
from aioinfer.transports.ipc.connection import BLOCKING_CALLS, BlockingCall
from aioinfer.transports.network.connection import MAX_BACKLOG, Call, Connection, client_closed, connection_of, release
from aioinfer.transports.network.link import Address, check_url
from aioinfer.transports.network.messages import Payload, check_payload
from aioinfer.transports.network.protocol import MODE_NAMES
from aioinfer.transports.replies import LockWaker, ReplySink

__all__ = ["NetworkEndpoint", "find"]


def find(url: str, *, token: str | None, tls: ssl.SSLContext | None, timeout: float | None) -> NetworkEndpoint:
    """Find a server by its URL; see :func:`aioinfer.connect`."""
    check_url(url)
    endpoint = NetworkEndpoint(Address(url.rstrip("/"), token, tls), 1)
    try:
        endpoint.connect().opened().result(timeout)
    except TimeoutError:
        endpoint.close()
        raise TimeoutError(f"the server at {url} does not answer within {timeout} seconds") from None
    except BaseException:
        endpoint.close()
        raise
    return endpoint


class NetworkEndpoint:
    """A number of clients of one process, and how they reach the server. It pickles, if it has no TLS context.

    Any thread.

    Args:
        address: of the server.
        count: how many clients.
    """

    def __init__(self, address: Address, count: int) -> None:
        check_count(count)
        self.address = address
        self._count = count
        self._connection: Connection | None = None
        self._clients: weakref.WeakSet[ClientBase] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[NetworkEndpoint], tuple[Address, int]]:
        return NetworkEndpoint, (self.address, self._count)

    def replace(self, count: int, *, copy: bool = True) -> NetworkEndpoint:
        """Another endpoint, for the same server. Replies are the callers' own in any case."""
        return NetworkEndpoint(self.address, count)

    def connect(self) -> Connection:
        """Keep the connection of this process open, also if it has no clients yet."""
        self._connection = connection_of(self.address, self)
        return self._connection

    def close(self) -> None:
        """Close all clients that were made here."""
        connection, self._connection = self._connection, None
        if connection is not None:
            release(connection, self)
        for client in list(self._clients):
            client.close()

    def clients(self) -> list[InferenceClient]:
        """The clients, for threads that block."""
        return [_Client(self) for _ in range(self._count)]

    def async_clients(self) -> list[AsyncInferenceClient]:
        """The clients, for tasks."""
        return [_AsyncClient(self) for _ in range(self._count)]

    def add(self, client: ClientBase) -> None:
        """Note a client of this process."""
        self._clients.add(client)


_numbers = itertools.count(1)


class ClientBase:
    """What both kinds of client share. It pickles."""

    def __init__(self, endpoint: NetworkEndpoint | None) -> None:
        self._endpoint = endpoint  # None: it was closed
        self._number = next(_numbers)
        self._connection: Connection | None = None
        if endpoint is not None:
            endpoint.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._endpoint,)

    def close(self) -> None:
        self._endpoint = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close_client(self._number)
            release(connection, self)

    def _connect(self) -> Connection:
        """The connection of this process.

        Raises:
            ClientClosedError: the client was closed.
        """
        connection = self._connection
        if connection is None or connection.closed:
            if self._endpoint is None:
                raise client_closed()
            connection = self._connection = connection_of(self._endpoint.address, self)
            if self._endpoint is None:  # another thread has closed the client meanwhile
                self.close()
                raise client_closed()
        return connection

    def _check(self, connection: Connection, td: Any) -> tuple[Payload, int]:
        """Return a request as it travels, and its size; an invalid one is counted by the server.

        Raises:
            InvalidRequestError: it can't be served.
        """
        try:
            if type(td) is dict:
                check_entries(td, None)  # the server knows which dtypes numbers should have
            elif not isinstance(td, TensorDictBase):
                raise InvalidRequestError(
                    f"a request must be a TensorDict, a mapping, or entries by name, got {type(td).__qualname__}"
                )
            return check_payload(td)
        except InvalidRequestError:
            connection.count_refusal()
            raise

    def _call(
        self,
        payload: Payload,
        size: int,
        receiver: Any,
        sink: ReplySink,
        caller: int,
        wait: bool,
        timeout: float | None,
    ) -> Call:
        return Call(
            payload,
            size,
            receiver,
            sink,
            owner=self._number,
            caller=caller,
            mode=MODE_NAMES[mode_code(caller_mode())],
            wait=bool(wait),
            timeout=None if timeout is None or not math.isfinite(timeout) else float(timeout),
        )


def _overloaded() -> ServerOverloadedError:
    return ServerOverloadedError(
        f"{MAX_BACKLOG >> 20} MiB of requests wait to be sent; await replies before you submit more"
    )


class _FutureSink(ReplySink):
    """The way back to futures of threads."""

    def set_results(self, receivers: Sequence[Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        for future, reply in zip(receivers, replies, strict=True):
            future.settle(reply, None)

    def set_exceptions(self, receivers: Sequence[Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        for future, error in zip(receivers, errors, strict=True):
            future.settle(None, error)


_FUTURES = _FutureSink()


class _LoopSink(ReplySink):
    """The way back to the tasks of one event loop, and the way there: what they ask in one tick leaves together.

    Loop thread only: ``submit``. Any thread: the rest.
    """

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection = connection
        self.loop = loop
        self.backlog = 0  # bytes of what this tick has asked
        self._thread = threading.get_ident()
        self._calls: list[Call] = []

    def runs_here(self) -> bool:
        """Whether the caller runs on this loop, without the system call that ``get_running_loop`` makes up to 3.11."""
        return threading.get_ident() == self._thread and self.loop.is_running()

    def submit(self, call: Call) -> None:
        """Send a request when every task that this tick wakes has run."""
        if not self._calls:
            self.loop.call_soon(self._send)
        self._calls.append(call)
        self.backlog += call.size

    def _send(self) -> None:
        calls, self._calls, self.backlog = self._calls, [], 0
        self.connection.submit([call for call in calls if not call.over])

    def set_results(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        self._call_soon(asyncio.Future.set_result, receivers, replies)

    def set_exceptions(self, receivers: Sequence[Any], errors: Sequence[Exception]) -> None:
        self._call_soon(asyncio.Future.set_exception, receivers, errors)

    def _call_soon(self, *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self._settle, *args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            pass

    def _settle(self, settle: Any, futures: Sequence[asyncio.Future[Any]], outcomes: Sequence[Any]) -> None:
        try:
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    settle(future, outcome)
        except BaseException:  # of a signal handler: the others get theirs all the same
            self.loop.call_soon(self._settle, settle, futures, outcomes)
            raise


def _loop_sink(connection: Connection) -> _LoopSink:
    """The sink of the running event loop."""
    loop = asyncio.get_running_loop()
    sink: _LoopSink | None = connection.loop_sinks.get(id(loop))  # which no other thread asks for
    if sink is None or sink.loop is not loop or not sink.runs_here():
        sink = connection.loop_sinks[id(loop)] = _LoopSink(connection, loop)
    return sink


class _Client(ClientBase, InferenceClient):
    def submit(self, td: RequestLike | None = None, **entries: Any) -> Future[TensorDictBase]:
        td = make_request(td, entries)
        connection = self._connect()
        payload, size = self._check(connection, td)
        future: Future[TensorDictBase] = Future()
        if connection.backlog > MAX_BACKLOG:
            future.set_exception(_overloaded())
            return future
        call = self._call(payload, size, future, _FUTURES, 0, wait=False, timeout=None)
        future.add_done_callback(partial(_withdraw_cancelled, connection, call))
        connection.submit([call])
        return future

    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        td = make_request(td, entries)
        connection = self._connect()
        payload, size = self._check(connection, td)
        waiting = BlockingCall()
        waker = waiting.waker = LockWaker()
        caller = threading.get_ident()
        call = self._call(payload, size, waiting, BLOCKING_CALLS, caller, wait=wait, timeout=timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            connection.submit([call])
            while not waiting.done:
                if not waker.wait(None if deadline is None else deadline - time.monotonic()):
                    raise TimeoutError(f"no reply within {timeout} seconds")
        finally:
            if not waiting.done:
                connection.withdraw(call)
        return waiting.outcome()


class _AsyncClient(ClientBase, AsyncInferenceClient):
    def __init__(self, endpoint: NetworkEndpoint | None) -> None:
        super().__init__(endpoint)
        self._sink: _LoopSink | None = None  # that of the loop which used this client last

    def close(self) -> None:
        super().close()
        self._sink = None

    def _submit(
        self, td: Any, *, wait: bool = False, timeout: float | None = None
    ) -> tuple[asyncio.Future[TensorDictBase], Call, Connection]:
        connection = self._connect()
        payload, size = self._check(connection, td)
        sink = self._sink
        if sink is None or sink.connection is not connection or not sink.runs_here():
            sink = self._sink = _loop_sink(connection)
        future: asyncio.Future[TensorDictBase] = asyncio.Future(loop=sink.loop)  # in half the time of create_future
        task = asyncio.current_task(sink.loop)
        call = self._call(payload, size, future, sink, id(task) if task else 0, wait=wait, timeout=timeout)
        sink.submit(call)
        return future, call, connection

    def submit(self, td: RequestLike | None = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        td = make_request(td, entries)
        sink = self._sink
        if sink is not None and sink.backlog + sink.connection.backlog > MAX_BACKLOG:
            refused: asyncio.Future[TensorDictBase] = asyncio.get_running_loop().create_future()
            refused.set_exception(_overloaded())
            return refused
        future, call, connection = self._submit(td)
        future.add_done_callback(partial(_withdraw_cancelled, connection, call))
        return future

    async def __call__(
        self,
        td: RequestLike | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        wait: bool = False,
        **entries: Any,
    ) -> TensorDictBase:
        td = make_request(td, entries)
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self._await(td, wait, timeout)
        return await self._await(td, wait, None)

    async def _await(self, td: Any, wait: bool, timeout: float | None) -> TensorDictBase:  # noqa: ASYNC109
        future, call, connection = self._submit(td, wait=wait, timeout=timeout)
        try:
            return await future
        except BaseException:
            if future.cancelled() or not future.done():
                connection.withdraw(call)
            raise
        finally:
            del future  # the traceback of its error will lead here: it must not lead back


def _withdraw_cancelled(connection: Connection, call: Call, future: Any) -> None:
    if future.cancelled():
        connection.withdraw(call)
