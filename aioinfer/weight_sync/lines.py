"""The line between a worker and the trainer: acknowledgements, and the news that either of them died.

A worker makes a line when it begins, and again when the trainer at the other end is gone. So a line belongs to
one life of a worker and one of a trainer: what is said on it can't be taken for an answer to somebody else,
and its end is the end of one of them.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from aioinfer.errors import WeightSyncError, describe
from aioinfer.ipc.queue import Descriptor, DescriptorQueue

__all__ = ["Ack", "Hello", "Line", "Outcome", "answer_call", "call", "forks_wait", "reason_of"]


class Outcome(StrEnum):
    """What became of a publication at one worker."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    """A newer one was there."""
    REFUSED = "refused"
    HELLO = "hello"
    """No publication: the trainer has taken its end of the line."""
    FAREWELL = "farewell"
    """No publication: the worker shuts down."""


@dataclass(frozen=True, slots=True)
class Ack:
    """What a worker says of one publication.

    Attributes:
        outcome: what became of it.
        number: the sender's id, and the publication's number there; zero where there is no publication.
        reason: why it was refused.
        lent: whether the worker goes on reading its memory until the next one is applied.
    """

    outcome: Outcome
    number: tuple[bytes, int] = (b"", 0)
    reason: str = ""
    lent: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says when it makes a line.

    Attributes:
        line: the trainer's end of it.
        pid: the worker's process.
        thread: the thread whose event loop receives; 0 if there is none.
    """

    line: Descriptor
    pid: int
    thread: int


_LONGEST_REASON = 2000  # characters
_LENGTH = 4  # bytes before each message
_CHUNK = 1 << 16

# A forked child must not hold the ends of its parent's lines: nobody would see the parent die.
_lines: weakref.WeakSet[Line] = weakref.WeakSet()
forks_wait = threading.RLock()
"""Held by a fork, and while an end of a line is made that a forked child must know of."""


class _Socket(socket.socket):
    """Closed with the last reference to it."""

    def __del__(self) -> None:
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)  # a child that is forked just now may keep a copy of the descriptor
        self.close()


class Line:
    """One end. Any thread may say something, or hang up; one at a time may listen.

    Its descriptor is closed with the last reference to it: so nobody waits for a descriptor that is somebody else's by
    now. Nothing here blocks, and a signal handler that raises neither tears a message nor loses one.

    Args:
        descriptor: of a connected stream socket, which belongs to the line from now on; forked children don't have it.
    """

    def __init__(self, descriptor: int) -> None:
        self._sock = _Socket(fileno=descriptor)
        self._sock.setblocking(False)
        self._received: list[bytes] = []
        _lines.add(self)

    def fileno(self) -> int:
        """What is readable when something was said, or the other end is gone."""
        return self._sock.fileno()

    def say(self, ack: Ack) -> None:
        """Tell the other end, if it is still there. One that does not read is hung up on."""
        body = pickle.dumps(ack)
        data = len(body).to_bytes(_LENGTH, "little") + body
        try:
            read = self._sock.send(data) == len(data)
        except BlockingIOError:
            read = False
        except ConnectionError:
            return
        if not read:
            self.hang_up()

    def listen(self, note: Callable[[Ack], object]) -> None:
        """Give ``note`` what the other end has said. It must bear to be given the same again, if it was interrupted.

        Raises:
            EOFError: the other end is gone, and nothing is left of what it has said.
        """
        while True:
            data = b"".join(self._received)
            while (size := _LENGTH + int.from_bytes(data[:_LENGTH], "little")) <= len(data):
                note(pickle.loads(data[_LENGTH:size]))
                data = data[size:]
                self._received = [data]
            try:
                self._received.extend(map(self._sock.recv, (_CHUNK,)))  # stored before a signal handler may raise
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise EOFError from error
            if not self._received[-1]:
                raise EOFError

    def hang_up(self) -> None:
        """End the line, for both ends. Idempotent."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _close_in_child() -> None:
    for line in list(_lines):
        with suppress(OSError):
            line._sock.close()
    forks_wait.release()


os.register_at_fork(before=forks_wait.acquire, after_in_parent=forks_wait.release, after_in_child=_close_in_child)


def reason_of(error: BaseException) -> str:
    """Why weights are refused, for a process that may not know the class of the error."""
    reason = str(error) if isinstance(error, WeightSyncError) else describe(error)
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 3]}..."


def call(hellos: DescriptorQueue, *, thread: int) -> Line:
    """Make a line, leave its other end for the trainer, and return this one (worker side)."""
    with forks_wait:
        with suppress(queue.Empty):
            while True:  # those of a life before this one, that no trainer has read
                with suppress(ValueError):
                    hellos.unread(take=True)
        ours, theirs = socket.socketpair()
        line = Line(ours.detach())
        with theirs:
            hellos.put(Hello(Descriptor(theirs.fileno()), os.getpid(), thread))
    return line


def answer_call(hello: Hello) -> Line:
    """Take the trainer's end of a line that a worker has left, which may be gone by now (trainer side).

    Raises:
        OSError: there is no descriptor for it.
    """
    line = Line(os.dup(hello.line))
    line.say(Ack(Outcome.HELLO))
    return line
