"""The trainer's half: which worker gets which weights, sending them, and waiting for acknowledgements."""

from __future__ import annotations

import errno
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

import torch
from tensordict import TensorDictBase

from aioinfer.errors import WeightSyncError
from aioinfer.ipc.selector import Source, await_readable, wait_readable
from aioinfer.weight_sync.channel import (
    Ack,
    AckConnection,
    AckKind,
    Channel,
    Handshake,
    accept,
    fork_lock,
    make_message,
    parse_message,
)
from aioinfer.weight_sync.snapshot import SnapshotBuffer, SnapshotPool, SnapshotRef
from aioinfer.weight_sync.weights import Strategy, Weights, WeightsLike, as_tensordict, check_version, extract_weights

__all__ = ["DeviceMapFn", "DistributionPlan", "Sender", "Shard", "Work", "WorkerHandle"]

DeviceMapFn: TypeAlias = Callable[[int, TensorDictBase], WeightsLike]

# A waiting thread polls this often, in seconds: another waiting thread may have received its acknowledgement.
_POLL_INTERVAL = 0.05
_SHUT_DOWN = "has shut down"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shard:
    """Weights, and the workers that get them.

    Attributes:
        weights: references to the trainer's tensors, before they are copied.
        workers: by index.
        devices: for some workers, where one without a model gets the tensors.
    """

    weights: Weights
    workers: Sequence[int]
    devices: Mapping[int, str] = field(default_factory=dict)


class DistributionPlan:
    """Assigns weights to workers; for the arguments see ``init_on_sender``.

    Attributes:
        workers: all of them, by index.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        source: WeightsLike | None,
        params_map: Mapping[int, WeightsLike] | None,
        devices: Sequence[torch.device | str | int] | None,
        device_map_fn: DeviceMapFn | None,
        num_workers: int | None,
        known_workers: Sequence[int],
    ) -> None:
        optional = {"devices": devices, "device_map_fn": device_map_fn, "num_workers": num_workers}
        given = [name for name, value in optional.items() if value is not None]
        if params_map is not None:
            if source is not None or given:
                mixed = ", ".join([*(["weights or model"] if source is not None else []), *given])
                raise ValueError(f"params_map assigns weights to workers; it can't be combined with {mixed}")
            if not params_map:
                raise ValueError("params_map is empty")
        elif source is None:
            raise ValueError("init_on_sender needs weights, a model, a context that has it, or params_map")
        if devices is not None and device_map_fn is not None:
            raise ValueError("devices and device_map_fn both assign weights to workers; give one of them")
        if device_map_fn is not None and num_workers is None:
            raise ValueError("device_map_fn needs num_workers")
        if devices is not None and num_workers not in (None, len(devices)):
            raise ValueError(f"there are {len(devices)} devices for num_workers={num_workers}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self._strategy = strategy
        self._source = source
        self._params_map = params_map
        self._device_map_fn = device_map_fn
        if params_map is not None:
            self.workers: tuple[int, ...] = tuple(params_map)
        elif devices is not None:
            self.workers = tuple(range(len(devices)))
        elif num_workers is not None:
            self.workers = tuple(range(num_workers))
        else:
            self.workers = tuple(known_workers) or (0,)
        self._devices = {worker: str(torch.device(device)) for worker, device in enumerate(devices or ())}

    @property
    def is_uniform(self) -> bool:
        """Whether all workers get the same weights."""
        sets = {} if self._params_map is None else {id(weights) for weights in self._params_map.values()}
        return len(sets) <= 1 and self._device_map_fn is None

    def shards(self, weights: WeightsLike | None, workers: Sequence[int]) -> Iterator[Shard]:
        """Make the shards for ``workers`` one at a time, and keep none.

        Args:
            weights: the argument of ``send``; ``None``: the plan's own weights.
            workers: by index.
        """
        if weights is None and self._params_map is not None:
            groups: dict[int, list[int]] = {}
            for worker in workers:
                groups.setdefault(id(self._params_map[worker]), []).append(worker)
            for group in groups.values():
                yield Shard(extract_weights(self._params_map[group[0]], self._strategy), group)
            return
        source = self._source if weights is None else weights
        if source is None:
            raise ValueError("there are no weights to send: pass some, or give init_on_sender a model")
        if self._device_map_fn is None:
            yield Shard(extract_weights(source, self._strategy), workers, self._devices)
            return
        base = as_tensordict(extract_weights(source, self._strategy).detached())
        for worker in workers:
            yield Shard(extract_weights(self._device_map_fn(worker, base), self._strategy), [worker])


class Work:
    """One ``send`` under way: the workers that have yet to acknowledge it, and the failures of others.

    The sender's lock guards it.

    Args:
        allow_restart: whether a worker that died may be replaced by one that acknowledges.

    Attributes:
        pending: workers that have not answered.
        failures: by worker, why it does not use the weights.
    """

    def __init__(self, *, allow_restart: bool = False) -> None:
        self.allow_restart = allow_restart
        self.pending: set[int] = set()
        self.failures: dict[int, str] = {}

    def fail(self, worker: int, reason: str) -> None:
        """Record that a worker does not use the weights."""
        self.failures[worker] = reason
        self.pending.discard(worker)

    def check(self) -> None:
        """Raise :class:`WeightSyncError` if a worker failed."""
        if self.failures:
            reasons = [f"worker {worker} {reason}" for worker, reason in sorted(self.failures.items())]
            raise WeightSyncError("; ".join(reasons), failures=self.failures)


class WorkerHandle:
    """The sender's state of one worker. The sender's lock guards all of it but ``sources``.

    A signal handler may raise wherever a function is called, and the next call then repeats the interrupted step. So a
    message that was read is dropped last, and refcounts change between steps that call nothing.

    Args:
        worker: its index.
        channel: to the worker.
    """

    def __init__(self, worker: int, channel: Channel) -> None:
        self.worker = worker
        self._channel = channel
        self._handshake: Handshake | None = None
        self._connection: AckConnection | None = None
        self._disconnecting = False  # the worker has announced the end of this connection
        self._absence = "has not connected"  # why there is no connection
        self._receive_error: str | None = None  # why the last poll could not receive
        # By number: buffers that the worker may still read, and the work that waits for its answer.
        self._reading: dict[tuple[bytes, int], SnapshotBuffer] = {}
        self._latest: tuple[str, SnapshotRef] | None = None  # until the worker has answered it
        self._unanswered: dict[tuple[bytes, int], Work] = {}

    @property
    def sources(self) -> list[Source]:
        """Descriptors that are readable when :meth:`poll` has something to do."""
        connection = self._connection
        return [self._channel.handshakes, *([] if connection is None else [connection])]

    @property
    def is_connected(self) -> bool:
        """Whether the worker is alive, and receives."""
        return self._connection is not None

    @property
    def unanswered(self) -> int:
        """How many of the snapshots that callers wait for the worker has not answered."""
        return len(self._unanswered)

    @property
    def is_blocked_by_this_thread(self) -> bool:
        """Whether the worker receives on the event loop of the calling thread."""
        if self._connection is None or self._handshake is None:
            return False
        return (self._handshake.pid, self._handshake.thread) == (os.getpid(), threading.get_ident())

    # -- to the worker ---------------------------------------------------------------------------------

    def send(
        self, ref: SnapshotRef, buffer: SnapshotBuffer, work: Work, *, model_id: str, device: str | None, explicit: bool
    ) -> None:
        """Put a snapshot into the worker's queue. ``explicit``: the caller has named this worker."""
        ref = replace(ref, device=device)
        number, before = ref.number, self._latest
        buffer.refcount += 1
        self._reading[number] = buffer
        self._latest = model_id, ref
        try:
            self._channel.updates.put(make_message(model_id, ref))
        except (queue.Full, OSError) as error:
            if isinstance(error, OSError) and error.errno is None:  # raised by a signal handler
                raise
            self._latest = before
            self._release(number)
            work.fail(self.worker, f"was sent nothing: {error}" if str(error) else "has a full queue")
            return
        self._retract_unread()
        if self._connection is None and self._absence == _SHUT_DOWN and not explicit:
            return
        work.pending.add(self.worker)
        self._unanswered[number] = work
        if self._receive_error is not None:
            self._fail_unanswered(self._receive_error)
        elif self._connection is None and self._handshake is not None and not work.allow_restart:
            self._fail_unanswered(self._absence)

    def _retract_unread(self) -> bool:
        """Take unread messages out of the queue, except the latest; return whether the latest is still unread."""
        try:
            while not self._is_latest(self._unread(take=False)):
                taken = self._unread(take=True)
                if self._is_latest(taken):  # the worker has read the one before meanwhile
                    self._put_latest()
                    break
                if taken is not None:
                    self._complete(taken.number)  # a newer one follows
        except queue.Empty:
            return False
        return True

    def _unread(self, *, take: bool) -> SnapshotRef | None:
        """Peek at, or take back, the first unread message; ``None`` if no sender has put it.

        Raises:
            queue.Empty: the worker has read all messages.
        """
        try:
            _, ref = parse_message(self._channel.updates.unread(take=take))
        except ValueError:
            return None
        return ref if isinstance(ref, SnapshotRef) else None

    def _is_latest(self, ref: SnapshotRef | None) -> bool:
        latest = self._latest
        return latest is not None and ref is not None and latest[1].number == ref.number

    def _put_latest(self) -> None:
        assert self._latest is not None
        with suppress(queue.Full):  # there was space a moment ago
            self._channel.updates.put(make_message(*self._latest))

    # -- from the worker -------------------------------------------------------------------------------

    def poll(self) -> None:
        """Handle the acknowledgements and handshakes that have come."""
        try:
            self._receive()
            while (handshake := self._next_handshake()) is not None:
                with fork_lock:
                    if handshake is not self._handshake:
                        self._accept(handshake)
                    self._channel.handshakes.drop()
                self._receive()
            self._receive_error = None
        except OSError as error:
            if error.errno is None:  # raised by a signal handler
                raise
            self._receive_error = f"can't be listened to: {error.strerror}"
            self._fail_unanswered(self._receive_error)

    def _accept(self, handshake: Handshake) -> None:
        if handshake.connection < 0:  # then the worker's end is closed too, and it sends another handshake
            self._channel.handshakes.drop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        connection = accept(handshake)
        if self._connection is not None:  # the worker has restarted before its EOF was received
            self._disconnected("died")
        self._handshake, self._connection, self._disconnecting = handshake, connection, False

    def close(self) -> None:
        """Close the connection; the worker then offers one to the next trainer."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _next_handshake(self) -> Handshake | None:
        while True:
            try:
                with fork_lock:
                    handshake = self._channel.handshakes.peek()
            except queue.Empty:
                return None
            except ValueError:  # no worker has put it
                handshake = None
            if isinstance(handshake, Handshake):
                return handshake
            self._channel.handshakes.drop()

    def _receive(self) -> None:
        if self._connection is not None:
            try:
                self._connection.receive(self._handle)
            except EOFError:
                self._disconnected(_SHUT_DOWN if self._disconnecting else "died")

    def _handle(self, ack: Ack) -> None:
        if ack.kind is AckKind.DISCONNECT:
            self._disconnecting = True
        if ack.number not in self._reading:  # for an earlier trainer, or handled already
            return
        if self._latest is not None and self._latest[1].number == ack.number:
            self._latest = None
        if ack.kind is AckKind.NACK:
            self._complete(ack.number, f"refused: {ack.reason}")
        elif ack.kind is AckKind.SKIP:
            self._complete(ack.number)
        else:  # the worker reads no earlier snapshot any more, and this one only if it aliases it
            for number in [number for number in self._reading if number[1] <= ack.number[1]]:
                self._complete(number, keep=ack.aliased and number == ack.number)

    def _complete(self, number: tuple[bytes, int], failure: str | None = None, *, keep: bool = False) -> None:
        """Record the worker's answer, and release the buffer unless the worker is to ``keep`` it."""
        work = self._unanswered.get(number)
        if work is not None:
            if failure is None:
                work.pending.discard(self.worker)
            else:
                work.fail(self.worker, failure)
            del self._unanswered[number]
        if not keep:
            self._release(number)

    def _disconnected(self, reason: str) -> None:
        """Put the latest unanswered snapshot, read or not, into the queue for the worker's successor."""
        self._absence = reason
        self._fail_unanswered(reason)
        is_unread = self._retract_unread()
        if self._latest is not None and not is_unread:
            self._put_latest()
        for number in [n for n in self._reading if self._latest is None or n != self._latest[1].number]:
            self._release(number)
        self.close()

    def _fail_unanswered(self, reason: str) -> None:
        for work in self._unanswered.values():
            work.fail(self.worker, reason)
        self._unanswered.clear()

    def _release(self, number: tuple[bytes, int]) -> None:
        buffer = self._reading.get(number)
        if buffer is not None:
            buffer.refcount -= 1
            del self._reading[number]


def _exclusive(
    method: Callable[Concatenate[Sender, P], T],
) -> Callable[Concatenate[Sender, P], T]:
    """Run a method under the lock; refuse a signal handler that has interrupted one in the same thread."""

    @functools.wraps(method)
    def run(self: Sender, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            if self._busy:
                raise RuntimeError("a signal handler that has interrupted a call of a scheme can't send with it")
            self._busy = True
            try:
                return method(self, *args, **kwargs)
            finally:
                self._busy = False
                if self._closed:
                    self._close_connections()

    return run


class Sender:
    """Sends snapshots to the workers, and waits for their acknowledgements. Any thread may call.

    ``_lock`` guards the worker handles, the pool and all work; no thread holds it while it waits. A signal handler may
    close the sender at any moment: if it has interrupted a call, that call closes the connections as it ends.

    Args:
        plan: assigns weights to workers.
        channels: to each worker, by index.
        model_id: whose weights are published.
        timeout: seconds that workers have to acknowledge.

    Attributes:
        workers: the handles of the workers, by index.
        pool: the buffers of the snapshots.
        timeout: as given.
    """

    def __init__(
        self, plan: DistributionPlan, channels: Mapping[int, Channel], *, model_id: str, timeout: float
    ) -> None:
        self.workers = {worker: WorkerHandle(worker, channel) for worker, channel in channels.items()}
        self.pool = SnapshotPool()
        self.timeout = timeout
        self._plan = plan
        self._model_id = model_id
        self._lock = threading.RLock()
        self._busy = False  # under the lock
        self._closed = False

    def publish(
        self,
        weights: WeightsLike | None,
        worker_ids: int | Sequence[int] | None,
        version: int | None,
        *,
        sequential: bool = False,
        timeout: float | None = None,
    ) -> Work:
        """Take a snapshot of each shard of the weights, and put it into the queues of its workers.

        Args:
            weights: as for ``WeightSyncScheme.send``.
            worker_ids: as there. A worker that is named here and has shut down counts as failed.
            version: as there.
            sequential: wait until the connected workers have applied a shard before the next one is made.
            timeout: seconds to wait for workers, and for the successors of workers that die; ``None``: the sender's
                timeout, and for no successors.
        """
        check_version(version)
        plan, workers = self._plan, self._plan.workers
        if worker_ids is not None:
            workers = (worker_ids,) if isinstance(worker_ids, int) else tuple(worker_ids)
            if unknown := [worker for worker in workers if worker not in plan.workers]:
                raise ValueError(f"unknown workers {unknown}; there are {list(plan.workers)}")
            if len(set(workers)) < len(workers):
                raise ValueError(f"worker_ids names a worker twice: {list(workers)}")
        sequential = sequential and not plan.is_uniform
        work = Work(allow_restart=timeout is not None)
        shards = plan.shards(weights, workers)
        while (shard := next(shards, None)) is not None:
            targets = shard.workers
            self._publish(shard, work, version=version, explicit=worker_ids is not None)
            del shard  # before the next one is made
            if sequential:
                self._wait(work, self.connected(targets), timeout)
        return work

    @_exclusive
    def _publish(self, shard: Shard, work: Work, *, version: int | None, explicit: bool) -> None:
        if self._closed:
            raise RuntimeError("the scheme was shut down")
        handles = [self.workers[worker] for worker in shard.workers]
        for handle in handles:
            handle.poll()
        try:
            ref, buffer = self.pool.take(shard.weights, version)
        except OSError as error:  # the snapshot before stays published
            if error.errno is None:  # raised by a signal handler
                raise
            raise WeightSyncError(f"there is no memory for the weights: {error}") from error
        for handle in handles:
            device = shard.devices.get(handle.worker)
            handle.send(ref, buffer, work, model_id=self._model_id, device=device, explicit=explicit)

    @_exclusive
    def connected(self, workers: Iterable[int]) -> set[int]:
        """The connected ones of ``workers``, except one that receives on the event loop of the calling thread."""
        handles = [self.workers[worker] for worker in workers]
        for handle in handles:
            handle.poll()
        return {handle.worker for handle in handles if handle.is_connected and not handle.is_blocked_by_this_thread}

    # -- wait ------------------------------------------------------------------------------------------

    def wait(self, work: Work, timeout: float | None = None) -> None:
        """Block until all workers have answered, or ``timeout`` seconds passed; ``None``: the sender's timeout.

        Raises:
            WeightSyncError: it names the workers that refused, died or did not answer, and says why.
        """
        for worker in self._pending(work):
            if self.workers[worker].is_blocked_by_this_thread:
                work.fail(worker, "receives on the event loop that this call blocks; await asend() instead")
        self._wait(work, self.workers.keys(), timeout)
        self._fail_pending(work, timeout)
        work.check()

    def wait_connected(self, work: Work) -> None:
        """Do as :meth:`wait` for the workers in :meth:`connected`. A worker that does not answer in time is no failure.

        Raises:
            WeightSyncError: as :meth:`wait`.
        """
        self._wait(work, self.connected(self.workers))
        work.check()

    async def async_wait(self, work: Work) -> None:
        """Do as :meth:`wait`, without blocking the event loop."""
        deadline = time.monotonic() + self.timeout
        while (sources := self._sources(work, self.workers.keys())) and (left := self._left(deadline)) > 0:
            await await_readable(sources, min(left, _POLL_INTERVAL))
        self._fail_pending(work)
        work.check()

    def _wait(self, work: Work, workers: Iterable[int], timeout: float | None = None) -> None:
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (sources := self._sources(work, workers)) and (left := self._left(deadline)) > 0:
            wait_readable(sources, min(left, _POLL_INTERVAL))

    def _left(self, deadline: float) -> float:
        """Seconds until the deadline; 0 once the sender is closed."""
        return 0.0 if self._closed else deadline - time.monotonic()

    @_exclusive
    def _pending(self, work: Work) -> list[int]:
        for worker in tuple(work.pending):
            self.workers[worker].poll()
        return sorted(work.pending)

    def _sources(self, work: Work, workers: Iterable[int]) -> list[Source]:
        """The descriptors to wait for; empty if all of ``workers`` have answered."""
        pending = set(self._pending(work)) & set(workers)
        return [source for worker in pending for source in self.workers[worker].sources]

    @_exclusive
    def _fail_pending(self, work: Work, timeout: float | None = None) -> None:
        seconds = self.timeout if timeout is None else timeout
        for worker in tuple(work.pending):
            if self._closed:
                reason = "had not answered when the scheme was shut down"
            elif self.workers[worker].is_connected:
                reason = f"did not answer within {seconds:g} s"
            else:
                reason = f"has not connected within {seconds:g} s"
            work.fail(worker, reason)

    # -- end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections, and end all waiting; unread messages stay in the queues. Idempotent."""
        self._closed = True
        with self._lock:
            if not self._busy:
                self._close_connections()

    def _close_connections(self) -> None:
        for handle in self.workers.values():
            handle.close()
