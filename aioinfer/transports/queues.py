"""Callers in other processes whose requests may have any layout: they travel pickled."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from multiprocessing.context import BaseContext
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import InvalidRequestError, clone_exception
from aioinfer.interaction_type import MODES
from aioinfer.ipc.pickling import dumps, loads, loads_or
from aioinfer.ipc.sockets import NUMBER, FramedSocket, Listener, frame, header
from aioinfer.transports.control import Control, FromServer
from aioinfer.transports.line import Board, Line, RemoteRequest
from aioinfer.transports.processes import ProcessTransport
from aioinfer.transports.receivers import Asked
from aioinfer.transports.station import Station
from aioinfer.transports.tickets import Ticket

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

    def _lease(self, count: int = 1, copy: bool = True) -> Ticket:  # replies are copies in any case
        return _ParcelTicket(self.address, count, one_at_a_time=False)

    def _make_line(self, wire: FramedSocket, board: Board) -> Line:
        return _ParcelLine(wire, board, self)


class _ParcelLine(Line):
    def __init__(self, wire: FramedSocket, board: Board, transport: MPTransport) -> None:
        super().__init__(wire, board, transport)
        self._transport = transport
        self._control = transport._control
        self._requests: dict[int, RemoteRequest] = {}

    def join(self, ticket: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        if layouts:
            raise InvalidRequestError(f"the server at this address has no slots; the client was made for {layouts}")
        return None, [self._control.segment.fd]

    def describe(self) -> Ticket:
        return self._transport._lease()

    def ask_one(self, text: int, payload: bytes | None, *, wait: bool) -> None:
        number = text & NUMBER
        request = RemoteRequest(None, self, number, time.perf_counter(), MODES[text >> 56 & 15])
        self._requests[number] = request
        try:
            request.td = _unpack_request(payload or b"")
            self.transport.queue.admission.check_layout(request.td)
        except InvalidRequestError as error:
            self.set_exceptions([request], [error])
        else:
            self.transport.queue.put_remote(request, wait=wait)

    def cancel(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None:
            request.gone = True

    def leave(self) -> None:
        for request in list(self._requests.values()):
            request.gone = True

    def set_results(self, receivers: Sequence[RemoteRequest], replies: Sequence[TensorDictBase]) -> None:
        data: list[bytes] = []
        for receiver, reply in zip(receivers, replies, strict=True):
            try:
                data.append(frame(header(FromServer.REPLY, receiver.number), dumps(reply)))
            except BaseException as error:  # what does not pickle may raise anything
                self.set_exceptions([receiver], [clone_exception(error)])
            self.discard(receiver)
        self.send(b"".join(data))

    def discard(self, receiver: RemoteRequest) -> None:
        self._requests.pop(receiver.number, None)


def _unpack_request(payload: bytes) -> TensorDictBase:
    try:
        return loads(payload)  # type: ignore[no-any-return]
    except BaseException as error:  # a class of the user's may raise anything, also SystemExit
        raise InvalidRequestError(
            f"the request can't be unpickled in the server's process: {type(error).__qualname__}: {error}"
        ) from error


class _ParcelTicket(Ticket):
    def _connect(self) -> Station:
        return _ParcelStation(self.address, self.id, self.count)

    def cargo(self, td: TensorDictBase) -> bytes:
        if not isinstance(td, TensorDictBase):
            raise InvalidRequestError(f"a request must be a TensorDict, got {type(td).__qualname__}")
        try:
            return dumps(td)
        except Exception:  # what does not pickle may raise anything
            try:
                dumps(td)
            except Exception as error:
                raise InvalidRequestError(
                    f"the request does not pickle: {type(error).__qualname__}: {error}"
                ) from error
            raise  # it does pickle: so it was a signal's handler that raised


class _ParcelStation(Station):
    waits_for_welcome = False

    def _welcome(self, news: Any, descriptors: Sequence[int]) -> Control:
        (control,) = map(os.dup, descriptors)
        return Control.opened(control)

    def _load(self, asked: Sequence[Asked]) -> bytes:
        return b"".join([frame(text, cargo) for _, text, cargo in asked])

    def _unload(self, numbers: Sequence[int], payloads: Iterable[bytes | None]) -> Sequence[Any]:
        return [loads_or(payload or b"", clone_exception) for _, payload in zip(numbers, payloads, strict=False)]
