"""The server's end of connections to other processes: it accepts them, queues their requests, and sends replies."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.reduction import DupFd
from typing import Any, NoReturn, Self

import anyio
from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.client import AsyncInferenceClient, ClientMaker, InferenceClient
from aioinfer.errors import InvalidRequestError, ServerClosedError, clone_exception
from aioinfer.interaction_type import Mode
from aioinfer.ipc.pickling import dump_exception, dumps, loads
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import NUMBER, PLAIN, Frame, FramedSocket, Listener, frame, header, wait_for_any
from aioinfer.transports.base import Transport
from aioinfer.transports.ipc.client import Endpoint
from aioinfer.transports.ipc.connection import ClientCodec
from aioinfer.transports.ipc.protocol import REFUSED, FromClient, FromServer, State, StatusPage
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.queue import Admission, RequestQueue
from aioinfer.transports.request import Request

__all__ = ["ProcessTransport", "RemoteRequest", "ServerCodec", "ServerConnection", "TransportHandoff"]

# How often a connection is read that goes on sending: 4 MB, and no socket of ours holds as much.
_READS = 64
# Seconds until a server that was out of descriptors accepts connections again.
_ACCEPT_AGAIN = 0.5
# Seconds for which processes may keep their server from ending: without progress, and in any case.
NO_PROGRESS = 0.5
FLUSH_LIMIT = 2.0

_log = logging.getLogger("aioinfer")


class RemoteRequest(Request):
    """A request of another process. It is its own receiver."""

    __slots__ = ("cancelled", "number")

    def __init__(
        self,
        td: Any,
        connection: ServerConnection,
        number: int,
        submitted_at: float,
        mode: Mode,
        caller: Caller | None = None,
    ) -> None:
        super().__init__(td, self, connection, submitted_at, mode, caller)
        self.number = number
        self.cancelled = False

    def done(self) -> bool:
        """Whether its caller, or the whole process, went away."""
        return self.cancelled


class ServerCodec(ABC):
    """What the server makes of the requests and replies of one connection.

    Reading happens under the lock of the connection's selector. The model thread encodes, or the thread that closes
    the server.
    """

    @abstractmethod
    def accept(self, endpoint_id: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        """Accept the process: what it is told, and the descriptors that it gets; or raise why not.

        Args:
            endpoint_id: which clients it has.
            count: how many.
            layouts: what they take the requests and replies to look like.
        """

    @abstractmethod
    def decode(self, headers: Sequence[int]) -> Sequence[RemoteRequest]:
        """Note requests, as far as their headers say, without their kinds; raise for rubbish."""

    @abstractmethod
    def check(self, request: RemoteRequest, payload: bytes | None) -> None:
        """Read the payload of a request that was noted, and check it; raise :class:`InvalidRequestError`."""

    @abstractmethod
    def find(self, number: int) -> RemoteRequest | None:
        """The request of this number, if it has no reply yet."""

    @abstractmethod
    def encode(
        self, requests: Sequence[Any], replies: Sequence[TensorDictBase]
    ) -> tuple[bytes, dict[RemoteRequest, Exception]]:
        """Return the frames of replies, and the errors of requests whose replies can't be encoded.

        The other requests are forgotten: another thread may use them again at once.
        """

    @abstractmethod
    def forget(self, request: Any) -> None:
        """A request is over."""

    @abstractmethod
    def close(self) -> None:
        """The process is gone: cancel its requests, and free what was its own."""


class ServerConnection:
    """One process that has connected: the sink of its replies.

    Reading happens under the selector's lock. The model thread, or the thread that closes the server, sends.

    Args:
        sock: to the process.
        transport: the transport by which its requests come.
        manager: of all connections of the transport.
    """

    def __init__(self, sock: FramedSocket, transport: ProcessTransport, manager: ConnectionManager) -> None:
        self.socket = sock
        self.transport = transport
        self.codec = transport.new_codec(self)
        self.accepted = False
        self._accepting = False
        self._manager = manager

    # -- what the process says -------------------------------------------------------------------------

    def read_all(self) -> None:
        """Read all that has arrived; of what goes on arriving, no more than a socket holds."""
        for _ in range(_READS):
            if self not in self._manager.connections or not self.socket.readable():
                return
            self.read()

    def read(self) -> None:
        """Read what has arrived, as far as it fits a buffer."""
        if self._accepting:  # which polls other connections meanwhile
            return
        sock = self.socket
        try:
            if sock.unsent:
                sock.flush()
                self._manager.watch(self)
            headers, frames = sock.receive()
            if headers:
                self._queue_all(headers)
            else:
                self._handle(frames)
        except EOFError:
            self._manager.disconnect(self)
        except BaseException as error:  # rubbish, which may raise anything: it must cost no other process anything
            _log.warning("hung up on a process that sent what is no request: %s", type(error).__qualname__)
            self._manager.disconnect(self)

    def _handle(self, frames: Sequence[Frame]) -> None:
        for first, payload in frames:
            kind = first >> 60
            if kind == FromClient.HELLO:
                self._accept(payload or b"")
            elif kind == FromClient.RELEASE:
                if self.accepted or not self.transport.can_release:
                    raise ValueError("there is nothing to release")
                self.transport.release(payload or b"")
            elif kind == FromClient.DESCRIBE:
                self.send(frame(header(FromServer.HELLO_ACK), dumps(self.transport.endpoint())))
            elif not self.accepted:
                raise ValueError("it has not said hello")
            elif kind == FromClient.CANCEL:
                request = self.codec.find(first & NUMBER)
                if request is not None:
                    request.cancelled = True
            elif kind == FromClient.SETTLED_LOCALLY:
                stats = self.transport.queue.admission.stats
                stats.reject() if first & NUMBER == REFUSED else stats.succeed(1)
            elif kind in (FromClient.REQUEST, FromClient.REQUEST_WAIT):
                self._queue(first, payload, wait=kind == FromClient.REQUEST_WAIT)
            else:
                raise ValueError(f"unknown kind {kind}")

    def _accept(self, payload: bytes) -> None:
        if self.accepted:
            raise ValueError("it has said hello already")
        self._accepting = True
        try:
            ack, descriptors = self.codec.accept(*loads(payload))
        except BaseException as error:  # of its pickle, perhaps
            refusal = error if isinstance(error, Exception) else clone_exception(error)
            self.send(frame(header(FromServer.ERROR, NUMBER), dump_exception(refusal)))
            return
        finally:
            self._accepting = False
        if self not in self._manager.connections:  # it has ended meanwhile
            self.codec.close()
            return
        self.accepted = True
        self._manager.move(self)
        self.socket.send_descriptors(frame(header(FromServer.HELLO_ACK), dumps(ack)), descriptors)
        self._manager.watch(self)

    def _queue_all(self, headers: Sequence[int]) -> None:
        """Queue requests that have no payload."""
        if not self.accepted:
            raise ValueError("it has not said hello")
        queue = self.transport.queue
        if queue.admission.spec is None and self.transport.checked_by_clients:
            queue.put_remote_all(self.codec.decode(headers))
        else:
            for first in headers:
                self._queue(first, None, wait=False)

    def _queue(self, first: int, payload: bytes | None, *, wait: bool) -> None:
        (request,) = self.codec.decode([first % PLAIN])
        try:
            self.codec.check(request, payload)
        except InvalidRequestError as error:
            self.set_exceptions([request], [error])
        else:
            self.transport.queue.put_remote(request, wait=wait)

    # -- what it is told -------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send frames now, or as soon as there is room."""
        try:
            if not self.socket.send(data):
                self._manager.watch(self)
        except OSError as error:  # it can't be watched
            _log.warning("hung up on a process that can't be answered: %s", error)
            self._manager.disconnect(self)

    def set_results(self, receivers: Sequence[RemoteRequest], replies: Sequence[TensorDictBase]) -> None:
        data, failures = self.codec.encode(receivers, replies)
        self.send(data)
        if failures:
            self.set_exceptions(list(failures), list(failures.values()))

    def set_exceptions(self, receivers: Sequence[RemoteRequest], errors: Sequence[Exception]) -> None:
        data = b"".join(
            frame(header(FromServer.ERROR, receiver.number), dump_exception(error))
            for receiver, error in zip(receivers, errors, strict=True)
        )
        for receiver in receivers:  # afterwards: another thread may use it again for the next request at once
            self.codec.forget(receiver)
        self.send(data)

    def discard(self, receiver: RemoteRequest) -> None:
        self.codec.forget(receiver)


class ConnectionManager:
    """Accepts connections, and watches them.

    A connection whose process has not said hello is watched by the handshake selector, which an event loop polls: so a
    process is accepted also while the model is busy. The model thread's selector watches the others.

    Any thread. The selectors' lock guards who reads; ``_lock`` guards the connections.

    Args:
        transport: whose connections they are.
        listener: where processes connect.
    """

    def __init__(self, transport: ProcessTransport, listener: Listener) -> None:
        self.selector = Selector()
        self.handshake_selector = Selector(self.selector.lock)
        self.listener = listener
        self.connections: dict[ServerConnection, bool] = {}
        """Those that are open, and whether they are watched for room to write."""
        self._transport = weakref.ref(transport)
        self._lock = threading.Lock()
        self.handshake_selector.register(self.listener, self._accept)
        # For when there is no event loop, or it waits for us.
        self.selector.register(self.handshake_selector, self.handshake_selector.poll)

    def move_to(self, selector: Selector) -> None:
        """Be watched by another selector, which several transports share; before any thread waits."""
        if selector is self.selector:
            return
        with self.selector.lock, selector.lock:
            self.selector.unregister(self.handshake_selector)
            selector.register(self.handshake_selector, self.handshake_selector.poll)
            for connection, writable in self.connections.items():
                if connection.accepted:
                    self.selector.unregister(connection.socket)
                    selector.register(connection.socket, connection.read, writable=writable)
            self.selector, self.handshake_selector.lock = selector, selector.lock

    def move(self, connection: ServerConnection) -> None:
        """Have the model thread watch a connection that was accepted."""
        self.handshake_selector.unregister(connection.socket)
        self.selector.register(connection.socket, connection.read)

    def open(self) -> None:
        """Accept connections."""
        if not self.listener.is_open:
            self.listener.open()
            self.handshake_selector.register(self.listener, self._accept)

    def poll(self) -> None:
        """Accept connections and read some of what has been sent, whatever the model thread does."""
        self.handshake_selector.poll()
        self.selector.poll()

    def read_all(self, *, accepted_only: bool = False) -> None:
        """Read all that has arrived on any connection, whatever a selector says."""
        with self.selector.lock:
            for connection in list(self.connections):
                if connection.accepted or not accepted_only:
                    connection.read_all()

    def detach(self) -> int:
        """Accept nothing, and return the listening descriptor, by which another process can."""
        with self.selector.lock:
            self.handshake_selector.unregister(self.listener)
            return self.listener.detach()

    def close(self) -> None:
        """Accept nothing new; accepted connections stay."""
        with self.selector.lock:
            if self.listener.is_open:
                self._accept()
                self.handshake_selector.unregister(self.listener)
                self.listener.close()
            for connection in [connection for connection in self.connections if not connection.accepted]:
                self.disconnect(connection)

    def _accept(self) -> None:
        while True:
            try:
                sock = self.listener.accept()
                if sock is None:
                    return
                self._add(sock)
            except OSError:  # no descriptors are left, or no memory: processes that connect wait
                self.handshake_selector.unregister(self.listener)
                again = threading.Timer(_ACCEPT_AGAIN, self._accept_again)
                again.daemon = True
                again.start()
                return

    def _add(self, raw: socket.socket) -> None:
        sock = FramedSocket(raw)
        try:
            transport = self._transport()
            if transport is None:  # it is gone, and so will be this manager
                sock.close()
                return
            connection = ServerConnection(sock, transport, self)
            with self._lock:
                self.connections[connection] = False
            try:
                self.handshake_selector.register(sock, connection.read)
            except BaseException:
                self.disconnect(connection)
                raise
        except BaseException:
            sock.close()
            raise
        connection.read()

    def _accept_again(self) -> None:
        with self.selector.lock:
            if self.listener.is_open:
                self.handshake_selector.register(self.listener, self._accept)

    def flush(self) -> None:
        """Send what is left to send, and read what is half read, while that gets on; disconnect the rest."""
        give_up_at = time.monotonic() + FLUSH_LIMIT
        while busy := [c for c in list(self.connections) if c.socket.unsent or c.socket.has_partial_frame]:
            if time.monotonic() > give_up_at or not wait_for_any([c.socket for c in busy], NO_PROGRESS):
                break
            with self.selector.lock:
                for connection in busy:
                    connection.socket.flush()
                    self.watch(connection)
                    connection.read_all()
        for connection in busy:
            self.disconnect(connection)

    def watch(self, connection: ServerConnection) -> None:
        """Watch a connection for room to write, while something is unsent; called when that may have changed."""
        if connection.socket.unsent or self.connections.get(connection):
            with self.selector.lock:
                writable = connection.socket.unsent  # by now: the thread that comes last sees what there is
                if self.connections.get(connection, writable) != writable:
                    self.connections[connection] = writable
                    self._selector_of(connection).register(connection.socket, connection.read, writable=writable)

    def disconnect(self, connection: ServerConnection) -> None:
        """Close a connection. Idempotent."""
        with self.selector.lock:
            with self._lock:
                known = self.connections.pop(connection, None)
            if known is not None:
                self._selector_of(connection).unregister(connection.socket)
                connection.codec.close()  # first: a client that hears of the end may connect anew at once
                connection.socket.close()

    def _selector_of(self, connection: ServerConnection) -> Selector:
        return self.selector if connection.accepted else self.handshake_selector


class ProcessTransport(Transport, InferenceTransport):
    """Base of the transports whose callers live in other processes.

    The model thread waits for the sockets itself, beside its wake-ups: if the event loop read them and woke it, four
    processes would get 12 000 replies/s instead of 17 000, and 2 x 16 tasks 60 000 instead of 100 000. The event
    loop reads them too where requests must be refused while the model is busy.

    Args:
        address: a path to listen at; ``None`` makes an address up.
    """

    checked_by_clients = False
    """Whether clients send valid requests only, unless the server has a ``request_spec``."""
    can_release = False
    """Whether something is reserved for clients until they are used."""

    def __init__(self, address: str | None) -> None:
        super().__init__()
        self._handed_off = False
        self._listen(Listener(address))

    def _listen(self, listener: Listener) -> None:
        self._ended = False
        self._process = os.getpid()
        self.status = StatusPage()
        self.connections = ConnectionManager(self, listener)
        self._selector = self.connections.selector
        self.queue.selector(self._selector)

    # -- what depends on the transport -----------------------------------------------------------------

    @abstractmethod
    def new_codec(self, connection: ServerConnection) -> ServerCodec:
        """Make the codec of a new connection."""

    @abstractmethod
    def client_codec(self) -> ClientCodec:
        """Make the codec of clients."""

    def _reserve(self, endpoint: Endpoint) -> None:
        """Reserve what the clients of an endpoint need, until they are used."""

    def release(self, endpoint_id: bytes) -> bool:
        """Free what is reserved for an endpoint; return whether this process keeps account of that."""
        return False

    def _handoff_state(self) -> dict[str, Any]:
        """The attributes that another process needs, beside those that this class makes."""
        return {}

    # -- served in another process ---------------------------------------------------------------------

    @property
    def is_served(self) -> bool:
        """Whether a server runs on it, or it was handed to one in another process."""
        return self._handed_off or self.queue.serving

    def check_unused(self) -> None:
        """Raise :class:`RuntimeError` if it can't be handed off, since it is served, or has connections already."""
        if self.is_served or self.connections.connections:
            raise RuntimeError("the transport is in use already, or was given away")

    def hand_off(self) -> TransportHandoff:
        """Let another process serve: it listens at the same address, for the clients that were made here too.

        Raises:
            RuntimeError: a server has been made for the transport, or it was handed off before.
            OSError: no descriptor is left; the transport was not handed off.
        """
        self.check_unused()
        self.connections.listener.open()  # it is closed if a server was shut down meanwhile
        handoff = TransportHandoff(type(self), self._handoff_state(), self.address, self.connections.detach())
        self._handed_off = True
        return handoff

    @classmethod
    def _take_over(cls, state: dict[str, Any], listener: Listener) -> Self:
        transport = cls.__new__(cls)
        Transport.__init__(transport)
        transport.__dict__.update(state)
        transport._handed_off = False
        transport._listen(listener)
        return transport

    @property
    def _serves_elsewhere(self) -> bool:
        """Whether this process only knows the server's address: it handed the transport off, or is a forked child."""
        return self._handed_off or self._process != os.getpid()

    def close_unserved(self, error: ServerClosedError) -> None:
        """Fail the requests that wait, and all that come: no server will serve this transport."""
        queue = RequestQueue()
        queue.attach([self])
        queue.detach(error)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__qualname__} does not travel: hand its clients to other processes, "
            "or have it served in one by a ProcessInferenceServer"
        )

    # -- clients ---------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where separately started processes can get a client: :func:`aioinfer.connect`."""
        return self.connections.listener.address

    def endpoint(self) -> Endpoint:
        """An endpoint for which nothing is reserved."""
        return Endpoint(self.address, 1, self.client_codec())

    def _new_endpoint(self, count: int, copy: bool) -> Endpoint:
        endpoint = self.endpoint().replace(count, copy=copy)
        self._reserve(endpoint)
        return endpoint

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Not supported: a request needs a client.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"a {type(self).__qualname__} takes requests through its clients only; make one with client()"
        )

    client = ClientMaker.client
    async_client = ClientMaker.async_client

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        return self._new_endpoint(count, copy).clients()

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        return self._new_endpoint(count, copy).async_clients()

    # -- hooks for the server --------------------------------------------------------------------------

    def check_attach(self, queue: RequestQueue) -> None:
        if self._handed_off:
            raise RuntimeError("the transport was given to a server in another process")
        super().check_attach(queue)

    def attach(self, queue: RequestQueue) -> None:
        self.connections.open()
        self.connections.move_to(queue.selector(self._selector))
        self.status.set_version_key(queue.admission.version_key)
        self._ended = False
        super().attach(queue)
        self.on_admission()

    def on_admission(self) -> None:
        while self._process == os.getpid():
            admission = self.queue.admission
            state = self._state(admission)
            self.status.set_state(state, admission.closed)
            if self._state(self.queue.admission) is state:  # else another thread has changed it while it was written
                return

    def _state(self, admission: Admission) -> State:
        if admission.closed is not None:
            return State.ENDED if self._ended else State.CLOSED
        return State.PAUSED if admission.pauses else State.OPEN

    async def serve(self) -> None:
        while True:
            await anyio.wait_readable(self.connections.handshake_selector.fileno())
            self.connections.poll()
            self.queue.notify()  # the model thread does not hear of what another thread has read

    def read(self, *, wait: bool = False) -> None:
        self.connections.poll()
        self.connections.read_all()
        self.queue.notify()  # as above

    def close(self, error: ServerClosedError) -> None:
        self.connections.close()

    def detach(self, error: ServerClosedError) -> None:
        self.connections.flush()
        self._ended = True
        self.on_admission()
        self.connections.read_all()  # what was sent before that could be seen
        self.connections.flush()


class TransportHandoff:
    """A transport on its way to another process. It is inherited by fork, or pickles as that process is spawned."""

    def __init__(self, kind: type[ProcessTransport], state: dict[str, Any], address: str, descriptor: int) -> None:
        self._kind = kind
        self._state = state
        self._address = address
        self._descriptor: Any = descriptor

    def take(self) -> ProcessTransport:
        """Listen from now on (the other process)."""
        descriptor = self._descriptor if isinstance(self._descriptor, int) else self._descriptor.detach()
        return self._kind._take_over(self._state, Listener(self._address, descriptor))

    def close(self) -> None:
        """Let go of it, once the other process has started, or can't be (this process). Idempotent.

        If no process has taken it, none listens from then on: clients fail with :class:`ServerClosedError`.
        """
        if isinstance(self._descriptor, int) and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": DupFd(self._descriptor)}
