"""Clients for other processes: an endpoint pickles, and connects its process when a client of it is first used."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import threading
import time
import weakref
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient, check_count
from aioinfer.entries import RequestLike, make_request
from aioinfer.errors import (
    ClientBusyError,
    ClientClosedError,
    InferenceError,
    InvalidRequestError,
    PeerDiedError,
    ServerClosedError,
    clone_exception,
)
from aioinfer.futures import Future
from aioinfer.ipc.pickling import loads
from aioinfer.ipc.sockets import FramedSocket, connect_unix, frame, header, send_once
from aioinfer.transports.ipc.connection import (
    BLOCKING_CALLS,
    BlockingCall,
    ClientCodec,
    ClientConnection,
    LoopReader,
    client_closed,
)
from aioinfer.transports.ipc.protocol import FromClient

if TYPE_CHECKING:
    from aioinfer.transports.ipc.server import ProcessTransport

__all__ = ["Endpoint", "find"]

# Errors that `submit` does not raise, but lets the future fail with.
_REFUSALS = (InferenceError, OSError)


class Endpoint:
    """A number of clients of one process, and how they reach the server. It pickles.

    Any thread. ``_lock`` guards the connection and the clients.

    Args:
        address: where the server listens.
        count: how many clients.
        codec: of requests and replies.

    Attributes:
        connection: of this process; it may be dead by now.
    """

    def __init__(self, address: str, count: int, codec: ClientCodec) -> None:
        check_count(count)
        self.address = address
        self.count = count
        self.codec = codec
        self.id = secrets.token_bytes(8)
        self._reset()

    def replace(self, count: int, *, copy: bool = True) -> Endpoint:
        """Another endpoint, for the same server.

        Args:
            count: for how many clients.
            copy: ``False`` lends replies, valid until the client's next request, where the transport can.
        """
        return Endpoint(self.address, count, self.codec.new(copy=copy))

    def _reset(self) -> None:
        self.transport: weakref.ref[ProcessTransport] | None = None
        """The transport that reserves something for the clients until they are used, if it is of this process."""
        self._clients: weakref.WeakSet[ClientBase] = weakref.WeakSet()  # of this process, and not closed
        self._disconnect()

    def forget_parent(self) -> None:
        """In a forked child: the connection is the parent's; connect anew."""
        self._disconnect()
        for client in list(self._clients):
            client.forget_parent(self)

    def _disconnect(self) -> None:
        self._lock = threading.RLock()  # never held while anything blocks
        self.connection: ClientConnection | None = None
        _endpoints.add(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_clients", "connection", "transport")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def connect(self) -> ClientConnection:
        """Connect this process, unless it has a connection that works.

        Raises:
            ServerClosedError: the server is shut down.
            PeerDiedError: its process is gone.
            ClientClosedError: all of the clients were closed.
            OSError: no descriptor is left.
        """
        with self._lock:
            if not self._clients:
                raise client_closed()
            dead = None if self.connection is None else self.connection.dead
            if self.connection is None or dead is not None:
                try:
                    self.connection = ClientConnection(self.address, self.id, self.count, self.codec.new())
                except ServerClosedError as error:
                    if isinstance(dead, PeerDiedError):
                        raise PeerDiedError("the server's process is gone") from error
                    raise
            return self.connection

    def check(self, td: Any) -> Any:
        """Return the payload of a request; an invalid one is counted by the server, if it is there.

        Raises:
            InvalidRequestError: the request can't be served.
        """
        try:
            return self.codec.check(td)
        except InvalidRequestError:
            try:
                self.connect().count_rejection()
            except _REFUSALS:
                pass
            raise

    def add(self, client: ClientBase) -> None:
        """Note a client of this process."""
        with self._lock:
            self._clients.add(client)

    def remove(self, client: ClientBase) -> None:
        """Note that a client was closed; with the last one, the connection is."""
        with self._lock:
            self._clients.discard(client)
            connection, last = self.connection, not self._clients
        if last and (connection is None or connection.status is None):  # it may never be accepted
            self._release_unused()
        if connection is None:
            return
        if last:
            connection.close()
        else:
            connection.close_client(client.index)

    def _release_unused(self) -> None:
        """Tell the server that no process will say hello for clients that were never used."""
        if not self.codec.exclusive:  # nothing is reserved for them
            return
        transport = None if self.transport is None else self.transport()
        if transport is None or not transport.release(self.id):
            send_once(self.address, frame(header(FromClient.RELEASE), self.id))

    def close(self) -> None:
        """Close all the clients of this process."""
        for client in list(self._clients):
            client.close()

    def clients(self) -> list[InferenceClient]:
        """The clients, for threads that block."""
        return [_Client(self, index) for index in range(self.count)]

    def async_clients(self) -> list[AsyncInferenceClient]:
        """The clients, for tasks."""
        return [_AsyncClient(self, index) for index in range(self.count)]


# The connections of a process are not those of its forked children, which connect anew.
_endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _forget_parent() -> None:
    for endpoint in list(_endpoints):
        endpoint.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)


class _ClosedEndpoint:
    """The endpoint of a client that was closed."""

    codec = ClientCodec
    connection = None

    def check(self, _: object) -> NoReturn:
        raise client_closed()

    def add(self, _: object) -> None:
        pass

    remove = add

    def __reduce__(self) -> str:
        return "_CLOSED"


_CLOSED: Any = _ClosedEndpoint()


class ClientBase:
    """What both kinds of client share. It pickles."""

    def __init__(self, endpoint: Endpoint, index: int) -> None:
        self._endpoint = endpoint
        self.index = index
        self.number = -1
        """Of the last request, where the client has one under way at most."""
        self.forget_parent(endpoint)
        endpoint.add(self)

    def forget_parent(self, endpoint: Endpoint) -> None:
        """In a forked child: forget what other threads of the parent do."""
        self.lock: AbstractContextManager[object] | None = threading.RLock() if endpoint.codec.exclusive else None
        """Held while a request is noted, where there may be one only."""

    def __getstate__(self) -> tuple[Endpoint, int]:
        return self._endpoint, self.index

    def __setstate__(self, state: tuple[Endpoint, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def max_rows(self) -> int | None:
        return self._endpoint.codec.max_rows

    @property
    def has_slot(self) -> bool:
        return self._endpoint.codec.exclusive

    def close(self) -> None:
        endpoint, self._endpoint = self._endpoint, _CLOSED
        endpoint.remove(self)


class _Client(ClientBase, InferenceClient):
    def submit(self, td: RequestLike | None = None, **entries: Any) -> Future[TensorDictBase]:
        td = make_request(td, entries)
        endpoint = self._endpoint
        payload = endpoint.check(td)
        future: Future[TensorDictBase] = Future()
        try:
            connection = endpoint.connection
            if connection is None or connection.dead is not None:
                connection = endpoint.connect()
            number = (next(connection.numbers) & 0xFFFFFF) << 32 | self.index
            try:
                request = connection.prepare(self, number, payload, future, connection.futures, False)
                future.add_done_callback(partial(_cancel, connection, number))
                connection.send([request])
                connection.futures.ensure_reading()
            except BaseException:
                connection.cancel(number)
                raise
        except (ClientBusyError, ClientClosedError, InvalidRequestError):
            raise
        except _REFUSALS as error:
            future.set_exception(error)
        return future

    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        td = make_request(td, entries)
        endpoint = self._endpoint
        payload = endpoint.check(td)
        connection = endpoint.connection
        if connection is None or connection.dead is not None:
            connection = endpoint.connect()
        number = (next(connection.numbers) & 0xFFFFFF) << 32 | self.index
        call = BlockingCall()
        try:
            try:
                connection.send([connection.prepare(self, number, payload, call, BLOCKING_CALLS, wait)])
                connection.wait(number, call, timeout)
            finally:
                connection.finish_wait(number, call)
        finally:
            if not call.left:  # an exception of a signal handler kept it from its work
                connection.finish_wait(number, call)
        if not call.done:
            if connection.dead is not None:
                raise clone_exception(connection.dead)
            raise TimeoutError(f"no reply within {timeout} seconds")
        return call.outcome()


class _AsyncClient(ClientBase, AsyncInferenceClient):
    def __init__(self, endpoint: Endpoint, index: int) -> None:
        super().__init__(endpoint, index)
        self._reader: tuple[ClientConnection, LoopReader] | None = None

    def close(self) -> None:
        super().close()
        self._reader = None

    def _submit(self, td: Any, *, wait: bool) -> tuple[asyncio.Future[TensorDictBase], ClientConnection | None, int]:
        endpoint = self._endpoint
        payload = endpoint.check(td)
        try:
            connection = endpoint.connection
            if connection is None or connection.dead is not None:
                connection = endpoint.connect()
            known = self._reader
            if known is None or known[0] is not connection or not known[1].runs_here():
                known = self._reader = connection, connection.loop_reader()
            reader = known[1]
            future: asyncio.Future[TensorDictBase] = reader.loop.create_future()
            number = (next(connection.numbers) & 0xFFFFFF) << 32 | self.index
            try:
                request = connection.prepare(self, number, payload, future, reader, wait)
                reader.send_at_end_of_tick(connection, request)
            except BaseException:
                connection.cancel(number)
                raise
        except (ClientBusyError, ClientClosedError):
            raise
        except _REFUSALS as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future, None, -1
        return future, connection, number

    def submit(self, td: RequestLike | None = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        td = make_request(td, entries)
        future, connection, number = self._submit(td, wait=False)
        if connection is not None:
            future.add_done_callback(partial(_cancel, connection, number))
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
                return await self(td, wait=wait)
        future, connection, number = self._submit(td, wait=wait)
        try:
            return await future
        except BaseException:
            if connection is not None and (future.cancelled() or not future.done()):
                connection.cancel(number)
            raise
        finally:
            del future  # the traceback of its error will lead here: it must not lead back


def _cancel(connection: ClientConnection, number: int, future: Any) -> None:
    if future.cancelled():
        connection.cancel(number)


def find(address: str, *, timeout: float | None) -> Endpoint:
    """Find a server of this machine by the address of its transport; see :func:`aioinfer.connect`."""
    deadline = None if timeout is None else time.monotonic() + timeout
    sock = FramedSocket(connect_unix(address, timeout))
    try:
        sock.send(header(FromClient.DESCRIBE).to_bytes(8, sys.byteorder))
        while True:
            if not sock.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"the server at {address} does not answer within {timeout} seconds")
            _, frames = sock.receive()
            for _, payload in frames:
                endpoint: Endpoint = loads(payload or b"")
                return endpoint
    except EOFError:
        raise ServerClosedError(f"the server at {address} has ended") from None
    finally:
        sock.close()
