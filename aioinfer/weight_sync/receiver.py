"""The worker's half: takes the newest publication from its queue, and tells the trainer what became of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from aioinfer.errors import WeightSyncError
from aioinfer.weight_sync.channels import Channel
from aioinfer.weight_sync.lines import Ack, Line, Outcome, call, farewell, is_answered, say
from aioinfer.weight_sync.publications import Publication, Reader
from aioinfer.weight_sync.waiting import Source, async_wait_readable, wait_readable
from aioinfer.weight_sync.weights import Weights

__all__ = ["Arrival", "Receiver"]


def _reason(error: BaseException) -> str:
    """Why weights are refused, for a process that may not know the class of the error."""
    return str(error) if isinstance(error, WeightSyncError) else f"{type(error).__qualname__}: {error}"


class Arrival:
    """Weights that have arrived. Whoever takes them answers once: ``applied`` or ``refused``.

    Attributes:
        weights: views of the trainer's memory, valid until the answer.
        version: the sender's own number for them, if it gave one.
        device: where the sender wants a worker without a model to have them.
    """

    def __init__(self, publication: Publication, weights: Weights, line: Line) -> None:
        self.weights = weights
        self.version = publication.version
        self.device = publication.device
        self._number = publication.number
        self._line = line

    def applied(self, *, lent: bool = False) -> None:
        """Say that they are in use; ``lent``: as views, which stay valid until the next are applied."""
        say(self._line, Ack(self._number, Outcome.APPLIED, lent=lent))

    def refused(self, error: BaseException) -> None:
        """Say why they are not used."""
        say(self._line, Ack(self._number, Outcome.REFUSED, _reason(error)))

    def skipped(self) -> None:
        """Say that newer ones are used."""
        say(self._line, Ack(self._number, Outcome.SKIPPED))


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
        self._rubbish: ValueError | None = None
        self._lock = threading.Lock()  # guards the line
        self._closed = False
        self._line = call(channel.hellos, thread=thread)
        self.connected = False
        """Whether a trainer has answered since this worker came, and was there when ``take`` last looked."""

    @property
    def sources(self) -> Sequence[Source]:
        """What is readable when ``take`` has something to do."""
        return self._channel.updates, self._line

    def take(self) -> Arrival | None:
        """Take the newest weights, without waiting; older ones are skipped.

        Raises:
            ValueError: something else is on the queue.
        """
        self._call_again_if_alone()
        newest: Arrival | None = None
        while not self._closed and self._rubbish is None:
            try:
                received = self._channel.transport.next_message(0.0)
                arrival = None if received is None else self._read(*received)
            except ValueError as caught:
                self._rubbish = caught
                break
            if received is None:
                break
            if newest is not None and arrival is not None:
                newest.skipped()
            newest = arrival or newest
        if newest is None and self._rubbish is not None:  # else next time: what came before is not to be lost
            rubbish, self._rubbish = self._rubbish, None
            raise rubbish
        return newest

    def next(self, timeout: float | None) -> Arrival | None:
        """Wait up to ``timeout`` seconds, or for ever, for weights."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (arrival := self.take()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            wait_readable(self.sources, left)
        return arrival

    async def async_next(self) -> Arrival | None:
        """Wait for weights; ``None`` if the receiver is closed meanwhile. Cancelling it loses none."""
        while (arrival := self.take()) is None and not self._closed:
            await async_wait_readable(self.sources, None)
        return arrival

    def close(self) -> None:
        """Tell the trainer that this worker goes. What it publishes from now on waits for the next one."""
        with self._lock:
            self._closed = True
            self.connected = False
            farewell(self._line)

    def _read(self, model_id: str, publication: object) -> Arrival | None:
        if not isinstance(publication, Publication):
            raise ValueError(f"expected a publication on a scheme's weight queue, got {type(publication).__qualname__}")
        try:
            if model_id != self._model_id:
                os.close(publication.segment)
                raise WeightSyncError(f'these are weights of "{model_id}", this worker serves "{self._model_id}"')
            return Arrival(publication, self._reader.read(publication), self._line)
        except Exception as error:  # also what mapping the memory, or unpickling an extra state, may raise
            say(self._line, Ack(publication.number, Outcome.REFUSED, _reason(error)))
            return None

    def _call_again_if_alone(self) -> None:
        """Leave a line for the next trainer if the one that had the last line is gone."""
        with self._lock:
            if self._closed:
                return
            try:
                self.connected |= is_answered(self._line)
            except OSError:
                self._line.close()
                self._line = call(self._channel.hellos, thread=self._thread)
                self.connected = False
