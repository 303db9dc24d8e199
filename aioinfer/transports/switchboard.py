"""The server's end of the wires to other processes."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDictBase

from aioinfer.interaction import Mode
from aioinfer.transports.addresses import Listener
from aioinfer.transports.parcels import pack, pack_error, unpack
from aioinfer.transports.poller import Poller
from aioinfer.transports.requests import Request
from aioinfer.transports.wire import NUMBER, Frame, FromClient, FromServer, Wire, frame, word

__all__ = ["Line", "RemoteRequest", "Switchboard"]

_log = logging.getLogger("aioinfer")


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

    def __init__(self, wire: Wire, board: Switchboard) -> None:
        self.wire = wire
        self.board = board
        self.joined = False

    # -- what the process says -------------------------------------------------------------------------

    def read(self) -> None:
        """Take in what has arrived."""
        wire = self.wire
        if wire.unsent:
            wire.flush()
            self._look_out()
        try:
            words, frames = wire.receive()
            if words:
                self.ask(words)
            else:
                self._take_in(frames)
        except EOFError:
            self.board.drop(self)
        except Exception as error:  # rubbish: it must cost nobody else anything
            _log.warning("hung up on a process that sent what is no request: %r", error)
            self.board.drop(self)

    def _take_in(self, frames: Sequence[Frame]) -> None:
        for text, payload in frames:
            kind = text >> 60
            if kind == FromClient.JOIN:
                self._join(payload or b"")
            elif kind == FromClient.DESCRIBE:
                self.send(frame(word(FromServer.WELCOME), pack(self.describe())))
            elif not self.joined:
                raise ValueError("it has not joined")
            elif kind == FromClient.CANCEL:
                self.cancel(text & NUMBER)
            elif kind == FromClient.REFUSED:
                self.board.count_refusal()
            elif kind in (FromClient.REQUEST, FromClient.PATIENT_REQUEST):
                self.ask_one(text, payload, patient=kind == FromClient.PATIENT_REQUEST)
            else:
                raise ValueError(f"unknown kind {kind}")

    def _join(self, payload: bytes) -> None:
        try:
            ticket, count = unpack(payload)
            welcome, descriptors = self.join(ticket, count)
        except Exception as error:
            self.send(frame(word(FromServer.ERROR, NUMBER), pack_error(error)))
        else:
            self.joined = True
            self.board.move(self)
            self.wire.send_descriptors(frame(word(FromServer.WELCOME), pack(welcome)), descriptors)
            self._look_out()

    @abstractmethod
    def join(self, ticket: bytes, count: int) -> tuple[Any, Sequence[int]]:
        """Take the process in: what it is told, and the descriptors that it gets; or raise why not."""

    @abstractmethod
    def describe(self) -> Any:
        """A ticket like those of the clients, for whoever has none."""

    def ask(self, words: Sequence[int]) -> None:
        """Queue requests that have no payload; raise :class:`ValueError` if the process has not joined."""
        if not self.joined:
            raise ValueError("it has not joined")
        for text in words:
            self.ask_one(text, None, patient=False)

    @abstractmethod
    def ask_one(self, text: int, payload: bytes | None, *, patient: bool) -> None:
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
        if not self.wire.send(data):
            self._look_out()

    def _look_out(self) -> None:
        """Wait for room, if something is left unsent."""
        self.board.watch(self, writable=self.wire.unsent)

    @abstractmethod
    def deliver(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        """Send replies."""

    def fail(self, receivers: Sequence[RemoteRequest], errors: Sequence[Exception]) -> None:
        """Send errors."""
        for receiver in receivers:
            self.drop(receiver)
        self.send(
            b"".join(
                frame(word(FromServer.ERROR, receiver.number), pack_error(error))
                for receiver, error in zip(receivers, errors, strict=True)
            )
        )

    @abstractmethod
    def drop(self, receiver: Any) -> None:
        """A request is over."""


class Switchboard:
    """Answers processes that dial, and watches the lines to them.

    The door is for those that have not said yet who they are. An event loop watches it, so that a process is taken in
    also while the model is busy. The lines of the others are the model thread's to watch.

    Args:
        make_line: makes the line for a wire.
        listener: where they dial.
        count_refusal: called for each request that was refused at a client.
    """

    def __init__(
        self, make_line: Callable[[Wire, Switchboard], Line], listener: Listener, count_refusal: Callable[[], None]
    ) -> None:
        self.poller = Poller()
        self.door = Poller(self.poller.lock)
        self.listener = listener
        self.count_refusal = count_refusal
        self.lines: dict[Line, bool] = {}
        """Those that are up, and whether they are watched for room to write."""
        self._make_line = make_line
        self._lock = threading.Lock()  # guards the lines
        self.door.watch(self.listener, self._accept)
        self.poller.watch(self.door, self.door.look)  # for when there is no event loop, or it waits for us

    def move_to(self, poller: Poller) -> None:
        """Be watched by another poller, that several boards share; before anybody waits."""
        if poller is self.poller:
            return
        with self.poller.lock, poller.lock:
            self.poller.forget(self.door)
            poller.watch(self.door, self.door.look)
            for line, writable in self.lines.items():
                if line.joined:
                    self.poller.forget(line.wire)
                    poller.watch(line.wire, line.read, writable=writable)
            self.poller, self.door.lock = poller, poller.lock

    def move(self, line: Line) -> None:
        """A line has joined: the model thread watches it from now on."""
        self.door.forget(line.wire)
        self.poller.watch(line.wire, line.read)

    def open(self) -> None:
        """Answer who dials."""
        if not self.listener.is_open:
            self.listener.open()
            self.door.watch(self.listener, self._accept)

    def read_all(self) -> None:
        """Read every line, whatever a poller says."""
        with self.poller.lock:
            for line in list(self.lines):
                line.read()

    def give_away(self) -> int:
        """Answer nobody, and return the listening descriptor, by which another process can."""
        with self.poller.lock:
            self.door.forget(self.listener)
            return self.listener.give_away()

    def close(self) -> None:
        """Answer nobody new; the lines that are up stay, but for those of processes that have not said who they are."""
        with self.poller.lock:
            if self.listener.is_open:
                self._accept()
                self.door.forget(self.listener)
                self.listener.close()
            for line in [line for line in self.lines if not line.joined]:
                self.drop(line)

    def _accept(self) -> None:
        while (sock := self.listener.accept()) is not None:
            line = self._make_line(Wire(sock), self)
            with self._lock:
                self.lines[line] = False
            self.door.watch(line.wire, line.read)
            line.read()

    def watch(self, line: Line, *, writable: bool) -> None:
        """Watch a line also for room to write, or no more."""
        if self.lines.get(line, writable) != writable:
            with self.poller.lock:
                if line in self.lines:
                    self.lines[line] = writable
                    (self.poller if line.joined else self.door).watch(line.wire, line.read, writable=writable)

    def drop(self, line: Line) -> None:
        """Hang up."""
        with self.poller.lock:
            with self._lock:
                known = self.lines.pop(line, None)
            if known is not None:
                (self.poller if line.joined else self.door).forget(line.wire)
                line.wire.close()
                line.leave()
