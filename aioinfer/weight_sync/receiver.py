"""The worker's half: takes the newest snapshot from its queue, loads it, and acknowledges it to the trainer."""

from __future__ import annotations

import queue
import threading
import time

from tensordict import TensorDictBase
from torch import nn

from aioinfer.ipc.selector import Source, await_readable, wait_readable
from aioinfer.weight_sync.channel import Ack, AckConnection, AckKind, Channel, connect, nack_reason, parse_message
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.snapshot import SnapshotReader, SnapshotRef, clone_tensors
from aioinfer.weight_sync.weights import Strategy, Weights, WeightsLike, extract_weights, to_strategy

__all__ = ["ReceivedUpdate", "Receiver", "WeightReceiver"]


class ReceivedUpdate:
    """A snapshot that a worker has received. The worker calls ``ack`` or ``nack`` once, in any thread.

    Attributes:
        ref: the reference to the snapshot.
        weights: views of the trainer's memory, valid until the snapshot is acknowledged.
    """

    def __init__(self, ref: SnapshotRef, weights: Weights, connection: AckConnection) -> None:
        self.ref = ref
        self.weights = weights
        self._sent: Ack | None = None
        self._connection = connection

    def ack(self, *, aliased: bool = False) -> None:
        """Report that the weights are in use; ``aliased``: as views, until the worker acknowledges the next ones."""
        self._send(Ack(AckKind.ACK, self.ref.number, aliased=aliased))

    def nack(self, error: BaseException) -> None:
        """Report why the worker refuses the weights."""
        self._send(Ack(AckKind.NACK, self.ref.number, nack_reason(error)))

    def skip(self) -> None:
        """Report that the worker uses newer weights."""
        self._send(Ack(AckKind.SKIP, self.ref.number))

    def use_connection(self, connection: AckConnection) -> None:
        """Answer by another connection: also once more what was answered, which the trainer may not have got."""
        self._connection = connection
        if self._sent is not None:  # which another thread sets before it sends
            connection.send_ack(self._sent)

    def _send(self, ack: Ack) -> None:
        self._sent = ack
        self._connection.send_ack(ack)


class Receiver:
    """Receives the snapshots of one worker.

    One thread at a time owns it. Another thread may acknowledge a :class:`ReceivedUpdate`, or close the receiver;
    ``_lock`` guards the connection.

    Args:
        channel: of the worker.
        model_id: the name under which its weights are published.
        thread: the thread whose event loop receives; 0 if there is none.

    Attributes:
        connected: whether a trainer has accepted the connection, and was alive at the last receive.
    """

    def __init__(self, channel: Channel, model_id: str, *, thread: int = 0) -> None:
        self._channel = channel
        self._model_id = model_id
        self._thread = thread
        self._reader = SnapshotReader()
        self._newest: ReceivedUpdate | None = None  # from the queue, and not returned yet
        self._last: ReceivedUpdate | None = None  # that was returned
        self._lock = threading.Lock()
        self._connection: AckConnection | None = connect(channel.handshakes, thread=thread)  # ``None`` when closed
        self.connected = False

    @property
    def _sources(self) -> list[Source]:
        """Descriptors that are readable when :meth:`receive_nowait` has something to do."""
        connection = self._connection
        return [self._channel.updates, *([] if connection is None else [connection])]

    def receive_nowait(self) -> ReceivedUpdate | None:
        """Take the newest weights from the queue, and skip older ones; ``None`` if there are none.

        Raises:
            ValueError: there is another object in the queue.
            OSError: there is no descriptor for a new connection. The next call tries again.
        """
        self._reconnect()
        updates = self._channel.updates
        while (connection := self._connection) is not None:
            try:
                update = self._read(*parse_message(updates.peek()), connection)
            except queue.Empty:
                break
            except ValueError:
                if self._newest is not None:  # return the update before it first; the next call raises
                    break
                updates.drop()
                raise
            if update is not None:
                if self._newest is not None and self._newest.ref.number != update.ref.number:
                    self._newest.skip()
                self._newest = update
            updates.drop()  # last: if an exception interrupts this call, the next one finds the message again
        newest, self._newest = self._newest, None
        self._last = newest or self._last
        return newest

    def receive(self, timeout: float | None) -> ReceivedUpdate | None:
        """Wait up to ``timeout`` seconds for weights; ``None`` waits for ever."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (update := self.receive_nowait()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if self._connection is None or (left is not None and left <= 0):  # a signal handler may have closed it
                return None
            wait_readable(self._sources, left)
        return update

    async def areceive(self) -> ReceivedUpdate | None:
        """Wait for weights; ``None`` if the receiver is closed meanwhile. Cancellation loses no update."""
        while (update := self.receive_nowait()) is None and self._connection is not None:
            await await_readable(self._sources, None)
        return update

    def close(self) -> None:
        """Disconnect from the trainer. The next worker gets what it publishes from now on. Idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
            self.connected = False
            if connection is not None:
                connection.send_ack(Ack(AckKind.DISCONNECT))
                connection.close()

    def _read(self, model_id: str, ref: object, connection: AckConnection) -> ReceivedUpdate | None:
        if not isinstance(ref, SnapshotRef):
            raise ValueError(f"expected a publication on a scheme's weight queue, got {type(ref).__qualname__}")
        if self._last is not None and ref.number == self._last.ref.number:
            self._last.use_connection(connection)  # the buffer may contain another snapshot by now
            return None
        if model_id != self._model_id:
            reason = f'these are weights of "{model_id}", this worker serves "{self._model_id}"'
            connection.send_ack(Ack(AckKind.NACK, ref.number, reason))
            return None
        try:
            return ReceivedUpdate(ref, self._reader.view(ref), connection)
        except (Exception, SystemExit) as error:  # of mapping memory, or of unpickling an extra state
            try:
                self._reader.view(ref)
            except (Exception, SystemExit):
                connection.send_ack(Ack(AckKind.NACK, ref.number, nack_reason(error)))
                return None
            raise  # a signal handler has raised it

    def _reconnect(self) -> None:
        """Offer a connection to the next trainer if the last trainer is gone."""
        with self._lock:
            if self._connection is None:
                return
            try:
                self._connection.receive(self._handle)
            except EOFError:
                self.connected = False
                connection = self._connection = connect(self._channel.handshakes, thread=self._thread)
                for update in (self._last, self._newest):  # the next trainer's, perhaps, before the last one was gone
                    if update is not None:
                        update.use_connection(connection)

    def _handle(self, _: Ack) -> None:
        self.connected = True


class WeightReceiver:
    """Receives weights into a model, in the calling thread; see ``WeightSyncScheme.init_on_receiver``.

    One thread at a time owns it.
    """

    def __init__(
        self,
        channel: Channel,
        model_id: str,
        model: nn.Module | TensorDictBase | None,
        *,
        strategy: Strategy,
        cast: bool,
    ) -> None:
        self._channel = channel
        self._model_id = model_id
        self._model = model
        self._loader = None if model is None else WeightLoader(model, cast=cast)
        self._strategy = strategy
        self._receiver: Receiver | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has offered a connection to the trainer."""
        return self._receiver is not None

    def connect(self, timeout: float) -> None:
        """Offer a connection to the trainer, and wait for the first weights."""
        if self._receiver is None:
            self._receiver = Receiver(self._channel, self._model_id)
        if self.receive(timeout) is None:
            raise TimeoutError(f"no weights came within {timeout:g} s; connect() may be called again")

    def receive(self, timeout: float) -> WeightsLike | None:
        """Apply the newest weights, or return ``None`` if none come within ``timeout`` seconds."""
        if self._receiver is None:
            raise RuntimeError("call connect() before receive()")
        update = self._receiver.receive(timeout)
        if update is None:
            return None
        try:
            weights = self._apply(update)
            update.ack()
        except BaseException as error:  # the sender waits for an answer, whatever was raised
            if self._loader is not None and self._loader.loaded is update.weights:  # a signal handler raised too late
                update.ack()
            else:
                update.nack(error)
            raise
        return to_strategy(weights, self._strategy)

    def _apply(self, update: ReceivedUpdate) -> Weights:
        if self._loader is None or self._model is None:
            own = clone_tensors(update.weights.tensors)
            if update.ref.device is not None:
                own = {name: tensor.to(update.ref.device) for name, tensor in own.items()}
            return Weights(own, update.weights.extra_states)
        self._loader.load(update.weights)
        return extract_weights(self._model, self._strategy).detached()

    def close(self) -> None:
        """Disconnect from the trainer. Idempotent."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
