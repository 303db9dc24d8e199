"""A worker as the trainer sees it: what it was sent, what it still reads, and whether it is there."""

from __future__ import annotations

import errno
import os
import queue
import threading
from contextlib import suppress
from dataclasses import replace

from aioinfer.errors import WeightSyncError
from aioinfer.ipc.selector import Source
from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.lines import Ack, Hello, Line, Outcome, answer_call, forks_wait
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
        self.failures[worker] = reason
        self.waiting.discard(worker)

    def check(self) -> None:
        """Raise :class:`WeightSyncError` if a worker failed."""
        if self.failures:
            reasons = [f"worker {worker} {reason}" for worker, reason in sorted(self.failures.items())]
            raise WeightSyncError("; ".join(reasons), failures=self.failures)


class Peer:
    """One worker. Under the sender's lock only, but for ``sources``.

    A signal handler may raise wherever something is called, and what was begun is then done again by the next
    call: so what was read is forgotten last, and counts change in steps between which nothing is called.

    Args:
        worker: its index.
        channel: the way to it.
    """

    def __init__(self, worker: int, channel: Channel) -> None:
        self.worker = worker
        self._channel = channel
        self._hello: Hello | None = None
        self._line: Line | None = None
        self._parting = False  # it has said farewell on this line
        self._absent = "has not connected"
        self._unheard: str | None = None  # why it could not be listened to just now
        # By number of the publication: memory that the worker may still read, and who waits for its answer.
        self._reading: dict[tuple[bytes, int], Stored] = {}
        self._newest: tuple[str, Publication] | None = None  # the last one, until the worker has answered it
        self._unanswered: dict[tuple[bytes, int], Delivery] = {}

    @property
    def sources(self) -> list[Source]:
        """What is readable when the worker has said something, or ended, or begun."""
        line = self._line
        return [self._channel.hellos, *([] if line is None else [line])]

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
        number, before = publication.number, self._newest
        stored.readers += 1
        self._reading[number] = stored
        self._newest = model_id, publication
        try:
            self._channel.transport.send_weights_async(publication, model_id)
        except (queue.Full, OSError) as error:
            if isinstance(error, OSError) and error.errno is None:  # out of a signal handler
                raise
            self._newest = before
            self._release(number)
            delivery.fail(self.worker, f"was sent nothing: {error}" if str(error) else "has a full queue")
            return
        self._take_back()
        if self._line is None and self._absent == _SHUT_DOWN and not named:
            return
        delivery.waiting.add(self.worker)
        self._unanswered[number] = delivery
        if self._unheard is not None:
            self._fail_unanswered(self._unheard)
        elif self._line is None and self._hello is not None and not delivery.patient:
            self._fail_unanswered(self._absent)

    def _take_back(self) -> bool:
        """Take out of the queue what nobody has read, but the newest; say whether that is there."""
        try:
            while not self._is_newest(self._unread(take=False)):
                taken = self._unread(take=True)
                if self._is_newest(taken):  # the worker was quicker, and has read what was there before
                    self._put_newest()
                    break
                if taken is not None:
                    self._settle(taken.number)  # a newer one follows
        except queue.Empty:
            return False
        return True

    def _unread(self, *, take: bool) -> Publication | None:
        """Look at, or take back, what nobody has read first; ``None`` if it is somebody else's.

        Raises:
            queue.Empty: all was read.
        """
        try:
            _, publication = opened(self._channel.updates.unread(take=take))
        except ValueError:
            return None
        return publication if isinstance(publication, Publication) else None

    def _is_newest(self, publication: Publication | None) -> bool:
        newest = self._newest
        return newest is not None and publication is not None and newest[1].number == publication.number

    def _put_newest(self) -> None:
        assert self._newest is not None
        model_id, publication = self._newest
        with suppress(queue.Full):  # there was room a moment ago
            self._channel.transport.send_weights_async(publication, model_id)

    # -- from the worker -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Read what the worker has said."""
        try:
            self._listen()
            while (hello := self._next_hello()) is not None:
                with forks_wait:
                    if hello is not self._hello:
                        self._answer(hello)
                    self._channel.hellos.drop()
                self._listen()
            self._unheard = None
        except OSError as error:
            if error.errno is None:  # out of a signal handler
                raise
            self._unheard = f"can't be listened to: {error.strerror}"
            self._fail_unanswered(self._unheard)

    def _answer(self, hello: Hello) -> None:
        if hello.line < 0:  # then the worker's end is closed too, and it leaves another one
            self._channel.hellos.drop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        line = answer_call(hello)
        if self._line is not None:  # the worker has begun anew, though its end was not seen yet
            self._lose("died")
        self._hello, self._line, self._parting = hello, line, False

    def hang_up(self) -> None:
        """End the line, so that the worker leaves another one for the next trainer."""
        if self._line is not None:
            self._line.hang_up()
            self._line = None

    def _next_hello(self) -> Hello | None:
        while True:
            try:
                with forks_wait:
                    hello = self._channel.hellos.peek()
            except queue.Empty:
                return None
            except ValueError:  # somebody else's
                hello = None
            if isinstance(hello, Hello):
                return hello
            self._channel.hellos.drop()

    def _listen(self) -> None:
        if self._line is not None:
            try:
                self._line.listen(self._note)
            except EOFError:
                self._lose(_SHUT_DOWN if self._parting else "died")

    def _note(self, ack: Ack) -> None:
        if ack.outcome is Outcome.FAREWELL:
            self._parting = True
        if ack.number not in self._reading:  # of a trainer before this one, or noted already
            return
        if self._newest is not None and self._newest[1].number == ack.number:
            self._newest = None
        if ack.outcome is Outcome.REFUSED:
            self._settle(ack.number, f"refused: {ack.reason}")
        elif ack.outcome is Outcome.SKIPPED:
            self._settle(ack.number)
        else:  # what came before is out of use, and this one too unless it is lent
            for number in [number for number in self._reading if number[1] <= ack.number[1]]:
                self._settle(number, keep=ack.lent and number == ack.number)

    def _settle(self, number: tuple[bytes, int], failure: str | None = None, *, keep: bool = False) -> None:
        """Tell who waits for an answer, and give the memory back, unless the worker is to ``keep`` it."""
        delivery = self._unanswered.get(number)
        if delivery is not None:
            if failure is None:
                delivery.waiting.discard(self.worker)
            else:
                delivery.fail(self.worker, failure)
            del self._unanswered[number]
        if not keep:
            self._release(number)

    def _lose(self, why: str) -> None:
        """The worker is gone: the newest it has not answered, read or not, is left for the one that takes its place."""
        self._absent = why
        self._fail_unanswered(why)
        is_there = self._take_back()
        if self._newest is not None and not is_there:
            self._put_newest()
        for number in [n for n in self._reading if self._newest is None or n != self._newest[1].number]:
            self._release(number)
        self.hang_up()

    def _fail_unanswered(self, why: str) -> None:
        for delivery in self._unanswered.values():
            delivery.fail(self.worker, why)
        self._unanswered.clear()

    def _release(self, number: tuple[bytes, int]) -> None:
        stored = self._reading.get(number)
        if stored is not None:
            stored.readers -= 1
            del self._reading[number]
