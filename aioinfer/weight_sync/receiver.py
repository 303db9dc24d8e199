"""The worker's half: takes the newest publication from its queue, and tells the trainer what became of it."""

from __future__ import annotations

import queue
import threading
import time

from aioinfer.ipc.selector import Source, await_readable, wait_readable
from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.lines import Ack, Line, Outcome, call, reason_of
from aioinfer.weight_sync.publications import Publication, Reader, opened
from aioinfer.weight_sync.weights import Weights

__all__ = ["Arrival", "Receiver"]


class Arrival:
    """Weights that have arrived. Whoever takes them answers once: ``applied`` or ``refused``.

    Attributes:
        weights: views of the trainer's memory, valid until the answer.
        version: the sender's own number for them, if it gave one.
        device: where the sender wants a worker without a model to have them.
        number: of the publication.
    """

    def __init__(self, publication: Publication, weights: Weights, line: Line) -> None:
        self.weights = weights
        self.version = publication.version
        self.device = publication.device
        self.number = publication.number
        self._answered: Ack | None = None
        self._line = line

    def applied(self, *, lent: bool = False) -> None:
        """Say that they are in use; ``lent``: as views, which stay valid until the next are applied."""
        self._answer(Ack(Outcome.APPLIED, self.number, lent=lent))

    def refused(self, error: BaseException) -> None:
        """Say why they are not used."""
        self._answer(Ack(Outcome.REFUSED, self.number, reason_of(error)))

    def skipped(self) -> None:
        """Say that newer ones are used."""
        self._answer(Ack(Outcome.SKIPPED, self.number))

    def repeat(self, line: Line) -> None:
        """Give the same answer to a trainer that has sent them again."""
        if self._answered is not None:
            line.say(self._answered)

    def _answer(self, ack: Ack) -> None:
        self._answered = ack
        self._line.say(ack)


class Receiver:
    """One worker's end. It belongs to one thread at a time; another one may answer an ``Arrival``, or close.

    Args:
        channel: the worker's.
        model_id: whose weights it receives.
        thread: the thread whose event loop receives; 0 if there is none.
    """

    def __init__(self, channel: Channel, model_id: str, *, thread: int = 0) -> None:
        self._channel = channel
        self._model_id = model_id
        self._thread = thread
        self._reader = Reader()
        self._newest: Arrival | None = None  # of what was taken from the queue
        self._last: Arrival | None = None  # that was handed out
        self._lock = threading.Lock()  # guards the line
        self._line: Line | None = call(channel.hellos, thread=thread)
        """``None`` when closed."""
        self.connected = False
        """Whether a trainer has answered since this worker came, and was there when ``take`` last looked."""

    @property
    def _sources(self) -> list[Source]:
        """What is readable when ``take`` has something to do."""
        line = self._line
        return [self._channel.updates, *([] if line is None else [line])]

    def take(self) -> Arrival | None:
        """Take the newest weights, without waiting; older ones are skipped.

        Raises:
            ValueError: something else is on the queue.
            OSError: there is no descriptor for a new line. The next call tries again.
        """
        self._call_again_if_alone()
        updates = self._channel.updates
        while (line := self._line) is not None:
            try:
                arrival = self._read(*opened(updates.peek()), line)
            except queue.Empty:
                break
            except ValueError:
                if self._newest is not None:  # what came before is not to be lost: next time
                    break
                updates.drop()
                raise
            if arrival is not None:
                if self._newest is not None and self._newest.number != arrival.number:
                    self._newest.skipped()
                self._newest = arrival
            updates.drop()  # only now: what an exception interrupts, the next call finds again
        newest, self._newest = self._newest, None
        self._last = newest or self._last
        return newest

    def next(self, timeout: float | None) -> Arrival | None:
        """Wait up to ``timeout`` seconds, or for ever, for weights."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (arrival := self.take()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if self._line is None or (left is not None and left <= 0):  # a signal handler may have closed it
                return None
            wait_readable(self._sources, left)
        return arrival

    async def anext(self) -> Arrival | None:
        """Wait for weights; ``None`` if the receiver is closed meanwhile. Cancelling it loses none."""
        while (arrival := self.take()) is None and self._line is not None:
            await await_readable(self._sources, None)
        return arrival

    def close(self) -> None:
        """Tell the trainer that this worker goes. What it publishes from now on waits for the next one."""
        with self._lock:
            line, self._line = self._line, None
            self.connected = False
            if line is not None:
                line.say(Ack(Outcome.FAREWELL))
                line.hang_up()

    def _read(self, model_id: str, publication: object, line: Line) -> Arrival | None:
        if not isinstance(publication, Publication):
            raise ValueError(f"expected a publication on a scheme's weight queue, got {type(publication).__qualname__}")
        if self._last is not None and publication.number == self._last.number:
            self._last.repeat(line)  # its memory may have been written again
            return None
        if model_id != self._model_id:
            reason = f'these are weights of "{model_id}", this worker serves "{self._model_id}"'
            line.say(Ack(Outcome.REFUSED, publication.number, reason))
            return None
        try:
            return Arrival(publication, self._reader.view(publication), line)
        except (
            Exception,
            SystemExit,
        ) as error:  # also what mapping memory, or unpickling an extra state, raises
            try:
                self._reader.view(publication)
            except (Exception, SystemExit):
                line.say(Ack(Outcome.REFUSED, publication.number, reason_of(error)))
                return None
            raise  # out of a signal handler, and not for the weights

    def _call_again_if_alone(self) -> None:
        """Leave a line for the next trainer if the one that had the last line is gone."""
        with self._lock:
            if self._line is None:
                return
            try:
                self._line.listen(self._answered)
            except EOFError:
                self.connected = False
                self._line = call(self._channel.hellos, thread=self._thread)

    def _answered(self, _: Ack) -> None:
        self.connected = True
