"""The line between a worker and the trainer: acknowledgements, and the news that either of them died.

A worker makes a line when it begins, and again when the trainer at the other end is gone. So a line belongs to
one life of a worker and one of a trainer: what is said on it can't be taken for an answer to somebody else,
and its end is the end of one of them.
"""

from __future__ import annotations

import os
import queue
import weakref
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeAlias

from aioinfer.weight_sync.queues import Descriptor, DescriptorQueue

__all__ = ["Ack", "Hello", "Line", "Outcome", "answer_call", "call", "farewell", "is_answered", "say"]


class Outcome(StrEnum):
    """What became of a publication at one worker."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    """A newer one was there."""
    REFUSED = "refused"
    FAREWELL = "farewell"
    """No publication: the worker shuts down."""


@dataclass(frozen=True, slots=True)
class Ack:
    """What a worker says of one publication.

    Attributes:
        number: the sender's id, and the publication's number there; zero in a farewell.
        outcome: what became of it.
        reason: why it was refused.
        lent: whether the worker goes on reading its memory until the next one is applied.
    """

    number: tuple[bytes, int]
    outcome: Outcome
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


Line: TypeAlias = "Connection[Ack, Ack]"

# A forked child must not hold the ends of its parent's lines: nobody would see the parent die.
_lines: weakref.WeakSet[Line] = weakref.WeakSet()


def _forget_lines() -> None:
    for line in _lines:
        line.close()


os.register_at_fork(after_in_child=_forget_lines)


def call(hellos: DescriptorQueue, *, thread: int) -> Line:
    """Make a line, leave its other end for the trainer, and return this one (worker side)."""
    while (stale := _next_hello(hellos)) is not None:  # of a life before this one, that no trainer has read
        os.close(stale.line)
    line, other = Pipe()
    hellos.put(Hello(Descriptor(other.fileno()), os.getpid(), thread))
    other.close()
    _lines.add(line)
    return line


def answer_call(hellos: DescriptorQueue) -> tuple[Hello, Line] | None:
    """Take the latest line that a worker has left, if there is one (trainer side)."""
    latest = _next_hello(hellos)
    while latest is not None and (later := _next_hello(hellos)) is not None:
        os.close(latest.line)
        latest = later
    if latest is None:
        return None
    line: Line = Connection(int(latest.line))
    _lines.add(line)
    try:
        line.send_bytes(b"hello")
    except OSError:  # it is dead already
        pass
    return latest, line


def is_answered(line: Line) -> bool:
    """Whether a trainer has taken the other end by now (worker side); raise :class:`OSError` if it is gone."""
    answered = False
    while line.poll():
        try:
            line.recv_bytes()
        except EOFError as error:
            raise ConnectionResetError from error
        answered = True
    return answered


def _next_hello(hellos: DescriptorQueue) -> Hello | None:
    try:
        hello = hellos.get_nowait()
    except queue.Empty:
        return None
    assert isinstance(hello, Hello)
    return hello


def say(line: Line, ack: Ack) -> None:
    """Tell the trainer, if it is still there."""
    try:
        line.send(ack)
    except OSError:
        pass


def farewell(line: Line) -> None:
    """Say that this is no death, and hang up."""
    say(line, Ack((b"", 0), Outcome.FAREWELL))
    line.close()
