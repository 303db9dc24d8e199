"""Callers in other processes whose requests may have any layout: they travel pickled."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from multiprocessing.context import BaseContext
from typing import Any

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.entries import Entries, check_entries
from aioinfer.errors import InvalidRequestError, clone_exception
from aioinfer.interaction_type import MODES
from aioinfer.ipc.pickling import dumps, loads, loads_or
from aioinfer.ipc.sockets import NUMBER, Listener, frame, header
from aioinfer.transports.ipc.connection import ClientCodec, OutgoingRequest
from aioinfer.transports.ipc.protocol import CLIENT_INDEX, FromServer, StatusPage
from aioinfer.transports.ipc.server import ProcessTransport, RemoteRequest, ServerCodec, ServerConnection

__all__ = ["MPTransport"]


class MPTransport(ProcessTransport):
    """Callers in other processes: requests of any layout, also with entries that are no tensors, travel pickled.

    Not the fast path: :class:`ProcessSlotTransport` answers several times as many requests, if they have a fixed
    layout. Like there, a worker holds one connected pair of sockets for all clients that it was handed
    together, and no lock or thread exists that a killed process could keep or stop. So this is no
    ``multiprocessing.Queue``, whatever the name says.

    Pickles are read from processes of the same user only; such a process can make the server run any code.

    Args:
        ctx: not needed: clients travel by any context. Accepted for those who know it from elsewhere.
        address: where workers connect, a path in the file system; by default one is made up.

    Raises:
        OSError: somebody listens at ``address`` already.
    """

    def __init__(self, ctx: BaseContext | None = None, *, address: str | None = None) -> None:
        super().__init__(address)

    def _listen(self, listener: Listener) -> None:
        super()._listen(listener)
        self._own = self.client()

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        return self._own.submit(td)

    def client_codec(self) -> ClientCodec:
        return _PickleClientCodec()

    def new_codec(self, connection: ServerConnection) -> ServerCodec:
        return _PickleServerCodec(connection)


class _PickleServerCodec(ServerCodec):
    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._requests: dict[int, RemoteRequest] = {}
        self._callers: defaultdict[int, Caller] = defaultdict(Caller)  # by client

    def accept(self, endpoint_id: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        if layouts:
            raise InvalidRequestError(f"the server at this address has no slots; the client was made for {layouts}")
        return None, [self._connection.transport.status.memory.fd]

    def decode(self, headers: Sequence[int]) -> Sequence[RemoteRequest]:
        now = time.perf_counter()
        requests: list[RemoteRequest] = []
        for first in headers:
            number = first & NUMBER
            caller = self._callers[number & CLIENT_INDEX]
            caller.asked_at = now
            request = RemoteRequest(None, self._connection, number, now, MODES[first >> 56 & 15], caller)
            self._requests[number] = request
            requests.append(request)
        return requests

    def check(self, request: RemoteRequest, payload: bytes | None) -> None:
        try:
            request.td = loads(payload or b"")
        except BaseException as error:  # a class of the user's may raise anything, also SystemExit
            raise InvalidRequestError(
                f"the request can't be unpickled in the server's process: {type(error).__qualname__}: {error}"
            ) from error
        admission = self._connection.transport.queue.admission
        batched = admission.check_layout(request.td)
        if type(request.td) is dict:
            request.td = admission.make_td(request.td)
        if batched:
            request.set_rows()

    def find(self, number: int) -> RemoteRequest | None:
        return self._requests.get(number)

    def encode(
        self, requests: Sequence[RemoteRequest], replies: Sequence[TensorDictBase]
    ) -> tuple[bytes, dict[RemoteRequest, Exception]]:
        data: list[bytes] = []
        failures: dict[RemoteRequest, Exception] = {}
        for request, reply in zip(requests, replies, strict=True):
            try:
                data.append(frame(header(FromServer.REPLY, request.number), dumps(reply)))
            except BaseException as error:  # a reply that does not pickle may raise anything
                failures[request] = clone_exception(error)
            else:
                self.forget(request)
        return b"".join(data), failures

    def forget(self, request: RemoteRequest) -> None:
        self._requests.pop(request.number, None)

    def close(self) -> None:
        for request in list(self._requests.values()):
            request.cancelled = True


class _PickleClientCodec(ClientCodec):
    waits_for_ack = False

    def accepted(self, ack: Any, descriptors: Sequence[int]) -> StatusPage:
        (status,) = map(os.dup, descriptors)
        return StatusPage.opened(status)

    def check(self, td: TensorDictBase | Entries) -> bytes:
        if type(td) is dict:
            check_entries(td, None)  # the server knows which dtypes numbers should have
        elif not isinstance(td, TensorDictBase):
            raise InvalidRequestError(
                f"a request must be a TensorDict, a mapping, or entries by name, got {type(td).__qualname__}"
            )
        try:
            return dumps(td)
        except Exception:  # a request that does not pickle may raise anything
            try:
                dumps(td)
            except Exception as error:
                raise InvalidRequestError(
                    f"the request does not pickle: {type(error).__qualname__}: {error}"
                ) from error
            raise  # it does pickle: so it was a signal handler that raised

    def encode(self, requests: Sequence[OutgoingRequest]) -> bytes:
        return b"".join([frame(first, payload) for _, first, payload in requests])

    def decode(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[Any]:
        return [loads_or(payload or b"", clone_exception) for _, payload in zip(numbers, payloads, strict=False)]
