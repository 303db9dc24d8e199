"""A worker as the trainer sees it: what it was sent, what it still reads, and whether it is there."""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import replace
from typing import Any

from aioinfer.errors import WeightSyncError
from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.lines import Ack, Hello, Line, Outcome, answer_call
from aioinfer.weight_sync.publications import Publication, Stored, opened

__all__ = ["Delivery", "Peer"]

_SHUT_DOWN = "has shut down"


class Delivery:
    """One call of ``send``: which workers have yet to answer, and what went wrong at the others.

    Args:
        patient: whether a worker that is gone may be followed by one that answers.

    Attributes:
        waiting: workers that have not answered.
        failures: by worker, why it does not use the weights.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.waiting: set[int] = set()
        self.failures: dict[int, str] = {}

    def fail(self, worker: int, reason: str) -> None:
        """Note that a worker does not use the weights."""
        self.waiting.discard(worker)
        self.failures[worker] = reason

    def check(self) -> None:
        """Raise :class:`WeightSyncError` if a worker failed."""
        if self.failures:
            reasons = [f"worker {worker} {reason}" for worker, reason in sorted(self.failures.items())]
            raise WeightSyncError("; ".join(reasons), failures=self.failures)


class Peer:
    """One worker. Under the sender's lock only, but for ``sources``.

    Args:
        worker: its index.
        channel: the way to it.
    """

    def __init__(self, worker: int, channel: Channel) -> None:
        self.worker = worker
        self._channel = channel
        self._hello: Hello | None = None
        self._line: Line | None = None
        self._absent = "has not connected"
        # By number of the publication: memory that the worker may still read, and who waits for its answer.
        self._reading: dict[tuple[bytes, int], Stored] = {}
        self._newest: tuple[str, Publication] | None = None  # the last one, until the worker has answered it
        self._unanswered: dict[tuple[bytes, int], Delivery] = {}

    @property
    def sources(self) -> list[Any]:
        """What is readable when the worker has said something, or ended, or begun."""
        return [self._channel.hellos, *([] if self._line is None else [self._line])]

    @property
    def is_there(self) -> bool:
        """Whether the worker lives, and receives."""
        return self._line is not None

    @property
    def is_blocked_by_this_thread(self) -> bool:
        """Whether the worker receives on the event loop of the thread that asks."""
        if self._line is None or self._hello is None:
            return False
        return (self._hello.pid, self._hello.thread) == (os.getpid(), threading.get_ident())

    # -- to the worker ---------------------------------------------------------------------------------

    def take_back(self) -> None:
        """Take unread publications out of the queue: only the newest is worth reading."""
        for publication in self._unread():
            self._release(publication.number)
            self._newest = None
            if (delivery := self._unanswered.pop(publication.number, None)) is not None:
                delivery.waiting.discard(self.worker)  # a newer one follows

    def deliver(
        self,
        publication: Publication,
        stored: Stored,
        *,
        model_id: str,
        device: str | None,
        delivery: Delivery,
        named: bool,
    ) -> None:
        """Leave a publication in the worker's queue. ``named``: the caller has asked for this worker."""
        publication = replace(publication, device=device)
        try:
            self._channel.transport.send_weights_async(publication, model_id)
        except queue.Full:
            delivery.fail(self.worker, "has a full queue")
            return
        stored.readers += 1
        self._reading[publication.number] = stored
        self._newest = model_id, publication
        if self._line is None and self._absent == _SHUT_DOWN and not named:
            return
        delivery.waiting.add(self.worker)
        self._unanswered[publication.number] = delivery
        if self._line is None and self._hello is not None and not delivery.patient:
            self._fail_unanswered(self._absent)

    def _unread(self) -> list[Publication]:
        """Take what nobody has read out of the queue."""
        unread: list[Publication] = []
        while True:
            try:
                _, publication = opened(self._channel.updates.get_nowait())
            except queue.Empty:
                return unread
            except ValueError:  # somebody else's
                continue
            if isinstance(publication, Publication):
                os.close(publication.segment)
                unread.append(publication)

    # -- from the worker -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Read what the worker has said."""
        while True:
            self._listen()
            answered = answer_call(self._channel.hellos)
            if answered is None:
                return
            if self._line is not None:  # the worker has begun anew, though its end was not seen yet
                self._lose("died")
            self._hello, self._line = answered

    def hang_up(self) -> None:
        """End the line, so that the worker leaves another one for the next trainer."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _listen(self) -> None:
        while self._line is not None:
            try:
                if not self._line.poll():
                    return
                ack = self._line.recv()
            except (EOFError, OSError):
                self._lose("died")
                return
            if ack.outcome is Outcome.FAREWELL:
                self._lose(_SHUT_DOWN)
            else:
                self._note(ack)

    def _note(self, ack: Ack) -> None:
        if ack.number not in self._reading:  # of a trainer before this one
            return
        if ack.outcome is Outcome.APPLIED:  # what came before is out of use, and this one too unless it is lent
            done = [n for n in self._reading if n[1] < ack.number[1] or (n == ack.number and not ack.lent)]
        else:
            done = [ack.number]
        for number in done:
            self._release(number)
        if self._newest is not None and self._newest[1].number == ack.number:
            self._newest = None
        delivery = self._unanswered.pop(ack.number, None)
        if delivery is None:
            return
        if ack.outcome is Outcome.REFUSED:
            delivery.fail(self.worker, f"refused: {ack.reason}")
        else:
            delivery.waiting.discard(self.worker)

    def _lose(self, why: str) -> None:
        """The worker is gone: the newest it has not answered, read or not, is left for the one that takes its place."""
        self.hang_up()
        self._absent = why
        self._fail_unanswered(why)
        self._unread()
        for number in [n for n in self._reading if self._newest is None or n != self._newest[1].number]:
            self._release(number)
        if self._newest is not None:
            model_id, publication = self._newest
            again = replace(publication, segment=self._reading[publication.number].descriptor)
            self._channel.transport.send_weights_async(again, model_id)

    def _fail_unanswered(self, why: str) -> None:
        for delivery in self._unanswered.values():
            delivery.fail(self.worker, why)
        self._unanswered.clear()

    def _release(self, number: tuple[bytes, int]) -> None:
        stored = self._reading.pop(number, None)
        if stored is not None:
            stored.readers -= 1
