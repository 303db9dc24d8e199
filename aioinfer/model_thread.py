"""The one thread that owns the model: it waits for requests, takes a batch, runs it, replies; and does jobs between."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import torch

from aioinfer.batching import BatchScheduler, DispatchReason, Hold
from aioinfer.errors import ServerClosedError, clone_exception, describe
from aioinfer.forward import ForwardPass, Outcome
from aioinfer.futures import Future
from aioinfer.stats import BatchRecord, StatsRecorder
from aioinfer.transports.queue import RequestQueue
from aioinfer.transports.request import Request, set_exceptions, set_results

__all__ = ["ModelThread", "Pause", "PendingPolicy", "check_policy"]

# A pass that takes no longer than this, in seconds, is mostly Python: beside callers that run Python too it would
# spend its time handing the GIL over. 10 000 tasks get 170 000 replies/s from a small model if passes and callers
# alternate, 60 000 to 130 000 if not. A longer pass releases the GIL for most of its time, and starts at once.
_SHORT_PASS = 0.0005
# One pass in so many alternates with the callers in any case, to see how long it takes undisturbed.
_LOOK_AGAIN = 32

_log = logging.getLogger("aioinfer")

Job: TypeAlias = Callable[[], None]


class ModelThread:
    """Serves a queue from ``start`` until it is closed or dies.

    Whatever touches the model runs here. So the model needs no lock, and nothing changes it during a forward pass. The
    thread waits for requests itself instead of being handed each batch by the event loop: a lone caller saves a
    wake-up of the loop, and under load the loop is woken for replies only.

    Any thread: the public methods. ``_lock`` guards ``_terminated`` and ``_unsettled``: requests that were claimed and
    are not settled. Each of them is settled once, by this thread or by ``terminate``, whatever the model, a transport
    or the code in between raises. Jobs and pauses are each added and removed in one step. This thread only: the rest.

    Args:
        queue: what is served; it belongs to this thread until the end.
        scheduler: says when a batch leaves.
        forward: runs the model.
        stats: counts passes and requests.
        on_exit: called last.
    """

    def __init__(
        self, queue: RequestQueue, scheduler: BatchScheduler, forward: ForwardPass, stats: StatsRecorder, on_exit: Job
    ) -> None:
        self._queue = queue
        self._scheduler = scheduler
        self._max_batch_size = scheduler.limits.max_batch_size
        self._forward = forward
        self._stats = stats
        self._on_exit = on_exit
        self._lock = threading.RLock()  # nothing is called under it, so that no signal handler runs under it either
        self._unsettled: Sequence[Request] = ()
        self._terminated: ServerClosedError | None = None
        self._jobs: deque[tuple[Job, Future[None]]] = deque()
        self._no_more_jobs = False
        self._asked_pauses: set[object] = set()  # with those that have not begun
        self._pauses: set[object] = set()
        self._draining = self._stopping = False
        self._free_since = 0.0  # when the thread looked for requests after a pass; 0 before
        self._passes = 0
        self._alternate = True
        self._seconds_alone = 0.0  # that a pass took lately which no woken caller disturbed
        self._ready: Future[None] = Future()
        self.ended: Future[None] = Future()
        # A daemon: a program that ends without shutting its server down must not hang.
        self._thread = threading.Thread(target=self._run, name="aioinfer-model", daemon=True)

    # -- start and end ---------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Start serving; the future resolves when the model is where it runs, or fails if it can't get there."""
        self._queue.serving = True
        try:
            self._thread.start()
        except BaseException:  # no thread can be made
            self._queue.serving = False
            self._on_exit()
            raise
        return self._ready

    def is_alive(self) -> bool:
        """Whether the thread runs, or is about to."""
        return not self.ended.done()

    @property
    def is_ready(self) -> bool:
        """Whether the model is where it runs, and warm, or could not get there."""
        return self._ready.done()

    @property
    def is_terminated(self) -> bool:
        """Whether nobody waits for the thread's end any more."""
        return self._terminated is not None

    def refuse(self, error: ServerClosedError) -> None:
        """Refuse new requests."""
        self._queue.refuse(error)

    def close(self, error: ServerClosedError, *, drain: bool) -> None:
        """Refuse new requests; then serve what is pending (``drain``), or fail it at once, and end."""
        if self.ended.done():
            return
        self._queue.refuse(error)
        if drain:
            self._draining = True
            self._queue.wake()
        else:
            self._stop()  # first: a caller that is told of the end may let the model go on
            self._queue.close(error)

    def _stop(self) -> None:
        """End the thread after the batch that runs now."""
        self._stopping = True
        self._queue.wake()

    def join(self, timeout: float | None) -> bool:
        """Wait for the end; return whether it came. Returns at once on the thread itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return self.ended.done()

    def terminate(self, error: ServerClosedError) -> None:
        """Fail what is pending and what the model works on; what it still returns is thrown away."""
        if self.ended.done():
            return
        self._stop()
        try:
            self._queue.close(error)
        except BaseException:
            _log.exception("the transports could not be closed")
        with self._lock:
            self._terminated = error
            requests, self._unsettled = self._unsettled, ()
        if threading.current_thread() is not self._thread:  # which gives a start the error that it has died of
            self._ready.settle(None, error)
        self._stats.fail(sum(not request.is_part for request in requests))
        self._fail(requests, error)
        try:
            self._queue.detach(error)  # last: it sees to it that the errors leave
        except BaseException:
            _log.exception("the transports could not be detached")

    @torch.no_grad()
    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            self._forward.open(lambda: self._stopping)
            self._queue.start()
            self._ready.settle(None, None)
            while not self._stopping:
                self._do_jobs()
                if self._stopping:  # a job may have taken the wake-up that told of it
                    break
                if self._pauses:
                    self._queue.stand_by()
                else:
                    self._serve_next()
        except BaseException as caught:
            cause = caught
        finally:
            self._no_more_jobs = True
            self._cancel_jobs()
            self._end(cause)
            if cause is not None:
                # As callers get it: no event loop hands a StopIteration over, and SystemExit ends one.
                self._ready.settle(None, clone_exception(cause))

    def _end(self, cause: BaseException | None) -> None:
        error = self._queue.admission.closed or ServerClosedError("the server has ended")
        if cause is not None:
            error = ServerClosedError(f"the server's worker died of {describe(cause)}")
            error.__cause__ = cause
            _log.error("the server's worker died", exc_info=cause)
        self.terminate(error)
        try:
            self._on_exit()
        except BaseException:
            _log.exception("the weights could not be released")
        finally:
            self._queue.serving = False
            self.ended.set_result(None)

    # -- jobs ------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> Future[None]:
        """Do ``job`` on the thread, before the next batch; the future is cancelled if the thread ends first.

        Raises:
            RuntimeError: called on this very thread, so that to wait for the future would never end.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("the model, and callbacks of its requests, can't wait for a pass to end, as updates do")
        future: Future[None] = Future()
        self._jobs.append((job, future))
        self._queue.wake()
        if self._no_more_jobs:  # perhaps too late for the thread to see it
            self._cancel_jobs()
        return future

    def _do_jobs(self) -> None:
        while self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    job()
                except BaseException as error:  # its future says so; it must not end the thread
                    future.set_exception(error)
                else:
                    future.set_result(None)

    def _cancel_jobs(self) -> None:
        while self._jobs:
            try:
                _, future = self._jobs.popleft()
            except IndexError:  # another thread was quicker
                return
            future.cancel()

    # -- pauses ----------------------------------------------------------------------------------------

    def pause(self, pending: PendingPolicy, pause: object) -> Future[None]:
        """Run no more passes, once the future resolves, until ``resume``; ``pending`` is as in ``paused``."""
        self._asked_pauses.add(pause)
        if pending == "wait":
            return self.submit(partial(self._serve_pending_and_pause, pause))
        if pending == "reject":
            self._queue.pause(pause)
        self._pauses.add(pause)
        return self.submit(self._reject_pending if pending == "reject" else _nothing)

    def resume(self, pause: object) -> None:
        """Undo a ``pause``, also one that has not come about yet; idempotent."""
        self._asked_pauses.discard(pause)
        self._queue.resume(pause)
        self._pauses.discard(pause)
        self._queue.wake()

    def _reject_pending(self) -> None:
        queue = self._queue
        queue.read(wait=True)
        left = len(queue)  # before the look: if the pause was given up, what comes now must be served
        while left > 0 and queue.admission.pauses:
            requests = queue.get_batch(min(left, self._max_batch_size))
            admission = queue.admission  # a part is counted with its request
            errors = [admission.paused_error() if part.is_part else admission.reject_paused() for part in requests]
            set_exceptions(requests, errors)
            queue.read()
            left = len(queue) if requests else 0

    def _serve_pending_and_pause(self, pause: object) -> None:
        self._queue.read(wait=True)
        left = len(self._queue)  # what comes meanwhile waits
        try:
            while (
                left > 0
                and not self._pauses  # another pause, for which they wait
                and self._queue.wait(1, 1, 0.0)
                and not self._queue.admission.closed
            ):
                requests = self._queue.get_batch(min(left, self._max_batch_size))
                left = left - sum(request.rows for request in requests) if requests else 0
                if requests:
                    self._reply(requests, DispatchReason.DRAIN)
        finally:
            self._pauses.add(pause)
            if pause not in self._asked_pauses:  # it was given up meanwhile
                self._pauses.discard(pause)

    # -- wait, take, run, reply ------------------------------------------------------------------------

    def _serve_next(self) -> None:
        queue, scheduler = self._queue, self._scheduler
        linger_limit = self._linger_limit()
        draining = self._draining  # once: a wait that was begun before has not taken in what callers have sent
        pending = queue.wait(1, linger_limit, 0.0 if draining else None)
        if pending == 0:
            if draining:
                self._stop()
            return
        now = time.perf_counter()
        oldest = queue.oldest(now)
        self._free_since = self._free_since or now
        decision = scheduler.decide(
            now=now,
            pending=pending,
            oldest=oldest,
            free_since=max(self._free_since, oldest),
            callers=None if pending >= scheduler.limits.min_batch_size else queue.callers(),  # else it doesn't matter
            draining=self._draining,
        )
        if isinstance(decision, Hold):
            if not (self._jobs or self._pauses or self._stopping):  # the wait above may have taken their wake-up
                queue.wait(pending + decision.rows, linger_limit, decision.seconds)
        # A rule may choose batches of fewer rows than the first request has.
        elif requests := queue.get_batch(scheduler.batch_size) or queue.get_batch(self._max_batch_size):
            self._reply(requests, decision, 0.0 if scheduler.held_since is None else now - scheduler.held_since)
            self._free_since = 0.0

    def _linger_limit(self) -> int:
        """How many pending requests let a pass begin while callers that were answered have not run yet."""
        self._alternate = self._seconds_alone <= _SHORT_PASS or self._passes % _LOOK_AGAIN == 0
        return sys.maxsize if self._alternate else self._max_batch_size

    def _reply(self, requests: Sequence[Request], reason: DispatchReason, held: float = 0.0) -> None:
        """Run the model over claimed requests; each of them is settled when this returns, whatever was raised.

        Args:
            requests: of one batch.
            reason: why it left.
            held: seconds for which it was held back.
        """
        taken_at = time.perf_counter()
        with self._lock:
            terminated = self._terminated
            self._unsettled = () if terminated else requests
        if terminated is not None:  # between taking the requests and now
            self._fail(requests, terminated)
            return
        try:
            if self._scheduler.is_learning:
                self._scheduler.on_batch(requests)
            for outcome in self._forward(requests):
                self._passes += 1
                if outcome.error is None:
                    self._queue.pass_seconds.append(outcome.seconds)
                    self._scheduler.on_pass(outcome.rows, outcome.seconds)
                if self._alternate:
                    self._seconds_alone = outcome.seconds
                if not self._claim(outcome):  # terminated, and what is left need not be computed
                    return
                self._settle(outcome, reason, taken_at, held)
        except BaseException as error:  # nothing of the model's: it must not end the server all the same
            _log.exception("a batch could not be served")
            with self._lock:
                unsettled, self._unsettled = self._unsettled, ()
            self._fail(unsettled, error)

    def _claim(self, outcome: Outcome) -> bool:
        """Whether the outcome's requests are still this thread's to settle."""
        with self._lock:
            if not self._unsettled:
                return False
            if len(outcome.requests) == len(self._unsettled):
                self._unsettled = ()
            elif outcome.requests:
                settled = set(map(id, outcome.requests))
                self._unsettled = [request for request in self._unsettled if id(request) not in settled]
            return True

    def _settle(self, outcome: Outcome, reason: DispatchReason, taken_at: float, held: float) -> None:
        """Settle requests that are claimed of those that are unsettled."""
        failure = outcome.error
        settled_at = time.perf_counter()
        try:
            submitted_at = [request.submitted_at for request in outcome.requests]
            gone = any([request.receiver.done() for request in outcome.requests])  # noqa: C419 - faster
            self._scheduler.on_replies(outcome.requests, submitted_at, settled_at)
            # Before the replies leave, so that a caller who has its reply finds it in the statistics.
            self._stats.batch(
                BatchRecord(
                    reason=reason,
                    submitted_at=submitted_at,
                    taken_at=taken_at,
                    held=held,
                    forward=outcome.seconds,
                    settled_at=settled_at,
                    ok=outcome.error is None,
                    cancelled=sum([one.receiver.done() and not one.is_part for one in outcome.requests]) if gone else 0,
                    rows=outcome.rows,
                    parts=outcome.parts,
                )
            )
            if outcome.replies is not None:
                set_results(outcome.requests, outcome.replies)
        except BaseException as error:
            _log.exception("replies could not be handed over")
            failure = failure or error
        if failure is not None:
            self._fail(outcome.requests, failure)

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        set_exceptions(requests, [clone_exception(error) for _ in requests])


def _nothing() -> None:
    """A job that tells when the thread has come this far."""


PendingPolicy: TypeAlias = Literal["keep", "wait", "reject"]


def check_policy(pending: str) -> None:
    """Raise :class:`ValueError` for anything but the three policies."""
    if pending not in ("keep", "wait", "reject"):
        raise ValueError(f'pending must be "keep", "wait" or "reject", got {pending!r}')


class Pause:
    """A stretch of time without forward passes, as ``paused`` returns it. Use it once, ``with`` or ``async with``.

    However the block is left, and wherever a signal handler raises, the pause is over: at the latest when the last
    reference to this object is gone. (A handler that raises as ``__exit__`` is called keeps it from running.)

    Args:
        begin: asks for the pause; the future resolves when no forward pass runs any more.
        end: ends it, or the wish for it, also before ``begin`` was called; idempotent.
    """

    def __init__(self, begin: Callable[[], Future[Any]], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end
        self._begun = False

    def __enter__(self) -> Self:
        try:
            self._begun = True
            self._begin().result()
        except CancelledError:
            self._leave()
            raise _closed_before() from None
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    async def __aenter__(self) -> Self:
        try:
            self._begun = True
            begun = asyncio.wrap_future(self._begin())
            # If nobody awaits it any more.
            begun.add_done_callback(lambda future: future.cancelled() or future.exception())
            await asyncio.wait([begun])  # which does not cancel it: what has begun must be ended
            if begun.cancelled():
                raise _closed_before()
            begun.result()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._end()
        self._begun = False

    def __del__(self) -> None:
        if self._begun:
            self._end()


def _closed_before() -> ServerClosedError:
    return ServerClosedError("the server was shut down before the pause began")
