"""The server's end of a wire to one process: what it asks, and what it is told."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

from tensordict import TensorDictBase

from aioinfer.errors import clone_exception
from aioinfer.interaction_type import Mode
from aioinfer.ipc.pickling import dump_exception, dumps, loads
from aioinfer.ipc.sockets import NUMBER, Frame, FramedSocket, frame, header
from aioinfer.transports.base import Transport
from aioinfer.transports.control import FromClient, FromServer
from aioinfer.transports.queue import Request

__all__ = ["Board", "Line", "RemoteRequest"]

# How often a line is read that never ends: 4 MB, and no socket of ours holds as much.
_READS = 64

_log = logging.getLogger("aioinfer")


class Board(Protocol):
    """Where lines hang."""

    @property
    def lines(self) -> Container[Line]:
        """Those that are up."""
        ...

    @property
    def count_refusal(self) -> Callable[[], None]:
        """Called for each request that was refused at a client."""
        ...

    def move(self, line: Line) -> None:
        """A line has joined."""
        ...

    def watch(self, line: Line) -> None:
        """Watch a line also for room to write, while something is unsent."""
        ...

    def drop(self, line: Line) -> None:
        """Hang up."""
        ...


class RemoteRequest(Request):
    """A request of another process. It is its own receiver."""

    __slots__ = ("gone", "number")

    def __init__(self, td: Any, line: Line, number: int, submitted_at: float, mode: Mode) -> None:
        super().__init__(td, self, line, submitted_at, mode)
        self.number = number
        self.gone = False

    def cancelled(self) -> bool:
        """Whether its caller, or the whole process, went away."""
        return self.gone

    def done(self) -> bool:
        """Whether nobody waits for the reply any more."""
        return self.gone


class Line(ABC):
    """One process that has connected: an outlet of its replies.

    Reading happens under the poller's lock. The model thread, or whoever closes the server, sends.

    Args:
        wire: to the process.
        board: where the line hangs.
    """

    def __init__(self, wire: FramedSocket, board: Board, transport: Transport) -> None:
        self.wire = wire
        self.transport = transport
        self.board = board
        self.joined = False
        self._joining = False

    # -- what the process says -------------------------------------------------------------------------

    def read_all(self) -> None:
        """Take in all that has arrived; of what goes on arriving, no more than a socket holds."""
        for _ in range(_READS):
            if self not in self.board.lines or not self.wire.readable():
                return
            self.read()

    def read(self) -> None:
        """Take in what has arrived, as far as it fits a buffer."""
        if self._joining:  # which looks at other lines meanwhile
            return
        wire = self.wire
        try:
            if wire.unsent:
                wire.flush()
                self.board.watch(self)
            words, frames = wire.receive()
            if words:
                self.ask(words)
            else:
                self._take_in(frames)
        except EOFError:
            self.board.drop(self)
        except BaseException as error:  # rubbish, which may raise anything: it must cost nobody else anything
            _log.warning("hung up on a process that sent what is no request: %s", type(error).__qualname__)
            self.board.drop(self)

    def _take_in(self, frames: Sequence[Frame]) -> None:
        for text, payload in frames:
            kind = text >> 60
            if kind == FromClient.HELLO:
                self._join(payload or b"")
            elif kind == FromClient.RELEASE:
                self.release(payload or b"")
            elif kind == FromClient.DESCRIBE:
                self.send(frame(header(FromServer.HELLO_ACK), dumps(self.describe())))
            elif not self.joined:
                raise ValueError("it has not joined")
            elif kind == FromClient.CANCEL:
                self.cancel(text & NUMBER)
            elif kind == FromClient.REFUSED:
                self.board.count_refusal()
            elif kind in (FromClient.REQUEST, FromClient.REQUEST_WAIT):
                self.ask_one(text, payload, wait=kind == FromClient.REQUEST_WAIT)
            else:
                raise ValueError(f"unknown kind {kind}")

    def _join(self, payload: bytes) -> None:
        if self.joined:
            raise ValueError("it has joined already")
        self._joining = True
        try:
            welcome, descriptors = self.join(*loads(payload))
        except BaseException as error:  # of its pickle, perhaps
            refusal = error if isinstance(error, Exception) else clone_exception(error)
            self.send(frame(header(FromServer.ERROR, NUMBER), dump_exception(refusal)))
            return
        finally:
            self._joining = False
        if self not in self.board.lines:  # it has ended meanwhile
            self.leave()
            return
        self.joined = True
        self.board.move(self)
        self.wire.send_descriptors(frame(header(FromServer.HELLO_ACK), dumps(welcome)), descriptors)
        self.board.watch(self)

    @abstractmethod
    def join(self, ticket: bytes, count: int, layouts: str) -> tuple[Any, Sequence[int]]:
        """Take the process in: what it is told, and the descriptors that it gets; or raise why not.

        Args:
            ticket: which clients it has.
            count: how many.
            layouts: what they take the requests and replies to look like.
        """

    def release(self, ticket: bytes) -> None:
        """Clients that no process has used were closed; raise :class:`ValueError` if there are no such clients here."""
        raise ValueError("there is nothing to release")

    @abstractmethod
    def describe(self) -> Any:
        """A ticket like those of the clients, for whoever has none."""

    def ask(self, words: Sequence[int]) -> None:
        """Queue requests that have no payload; raise :class:`ValueError` if the process has not joined."""
        if not self.joined:
            raise ValueError("it has not joined")
        for text in words:
            self.ask_one(text, None, wait=False)

    @abstractmethod
    def ask_one(self, text: int, payload: bytes | None, *, wait: bool) -> None:
        """Queue a request."""

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Withdraw a request, if it has no reply yet."""

    @abstractmethod
    def leave(self) -> None:
        """The process is gone: withdraw what it has asked, and free what was its own."""

    # -- what it is told -------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send frames now, or as soon as there is room."""
        try:
            if not self.wire.send(data):
                self.board.watch(self)
        except OSError as error:  # it can't be watched
            _log.warning("hung up on a process that can't be answered: %s", error)
            self.board.drop(self)

    @abstractmethod
    def set_results(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        """Send replies."""

    def set_exceptions(self, receivers: Sequence[RemoteRequest], errors: Sequence[Exception]) -> None:
        """Send errors."""
        data = b"".join(
            frame(header(FromServer.ERROR, receiver.number), dump_exception(error))
            for receiver, error in zip(receivers, errors, strict=True)
        )
        for receiver in receivers:  # afterwards: another thread may use it again for the next request at once
            self.discard(receiver)
        self.send(data)

    @abstractmethod
    def discard(self, receiver: Any) -> None:
        """A request is over."""
