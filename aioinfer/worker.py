"""One life of a server's worker: wait, take, forward, answer."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from aioinfer.batching import BatchRule, DispatchReason
from aioinfer.errors import ServerClosedError, clone_exception, describe
from aioinfer.executor import ModelThread
from aioinfer.forward import ForwardPass, Outcome
from aioinfer.futures import Future
from aioinfer.pause import PendingPolicy
from aioinfer.stats import StatsRecorder
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import ServedTransport
from aioinfer.transports.requests import Request

__all__ = ["Worker"]

# A pass that takes no longer than this, in seconds, is mostly Python: beside callers that run Python too it would
# spend its time handing the interpreter lock over. 10 000 tasks get 170 000 replies/s from a small model if they run
# by turns, 60 000 to 130 000 if not. A longer pass lets go of the lock for most of its time, and goes on at once.
_SHORT_PASS = 0.0005
# One pass in so many runs by turns in any case, to see how long it takes undisturbed.
_LOOK_AGAIN = 32

_log = logging.getLogger("aioinfer")


class Worker:
    """Serves a transport on a thread that owns the model, from ``start`` until it is closed or dies.

    Any thread: the public methods. ``_lock`` guards ``_abandoned`` and ``_unsettled``: requests that were claimed and
    are not settled. Each of them is settled once, by the model thread or by ``abandon``, whatever the model, the
    transport or the code in between raises. Model thread only: the rest.
    """

    def __init__(
        self,
        transport: ServedTransport,
        admission: Admission,
        rule: BatchRule,
        forward: ForwardPass,
        stats: StatsRecorder,
        at_end: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._admission = admission
        self._rule = rule
        self._forward = forward
        self._stats = stats
        self._at_end = at_end
        self._lock = threading.RLock()  # nothing is called under it, so that no signal handler runs under it either
        self._unsettled: Sequence[Request] = ()
        self._abandoned: ServerClosedError | None = None
        self._pauses: set[object] = set()
        self._draining = False
        self._passes = 0
        self._by_turns = True
        self._pass_alone = 0.0  # seconds that a pass took lately which no woken caller disturbed
        self.ended: Future[None] = Future()
        self._thread = ModelThread(
            prepare=forward.open,
            serve=self._serve_next,
            wake=transport.wake,
            stand_by=transport.stand_by,
            ended=self._on_end,
            name="aioinfer-model",
        )

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Start serving; the future resolves when the model is where it runs, or fails if it can't get there."""
        self._admission.serving = True
        try:
            return self._thread.start()
        except BaseException:  # no thread can be made
            self._admission.serving = False
            self._at_end()
            raise

    def is_alive(self) -> bool:
        """Whether the thread runs, or is about to."""
        return not self.ended.done()

    def refuse(self, error: ServerClosedError) -> None:
        """Refuse new requests."""
        self._admission.close(error)

    def close(self, error: ServerClosedError, *, drain: bool) -> None:
        """Refuse new requests; then serve what is pending (``drain``), or fail it at once, and end."""
        if self.ended.done():
            return
        self.refuse(error)
        if drain:
            self._draining = True
            self._transport.wake()
        else:
            self._thread.stop()  # first: a caller that is told of the end may let the model go on
            self._transport.close(error)

    def join(self, timeout: float | None) -> bool:
        """Wait for the end; say whether it came."""
        self._thread.join(timeout)
        return self.ended.done()

    def abandon(self, error: ServerClosedError) -> None:
        """Fail what is pending and what the model works on; what it still returns is thrown away."""
        if self.ended.done():
            return
        try:
            self.close(error, drain=False)
        except BaseException:
            _log.exception("the transport could not be closed")
        with self._lock:
            self._abandoned = error
            requests, self._unsettled = self._unsettled, ()
        self._stats.fail(len(requests))
        self._fail(requests, error)
        try:
            self._transport.finish(error)  # last: it sees to it that the errors leave
        except BaseException:
            _log.exception("the transport could not be finished")

    def _on_end(self, cause: BaseException | None) -> None:
        error = self._admission.closed or ServerClosedError("the server has ended")
        if cause is not None:
            error = ServerClosedError(f"the server's worker died of {describe(cause)}")
            error.__cause__ = cause
            _log.error("the server's worker died", exc_info=cause)
        self.abandon(error)
        try:
            self._at_end()
        except BaseException:
            _log.exception("the weights could not be released")
        finally:
            self._admission.serving = False
            self.ended.set_result(None)

    # -- between the batches ---------------------------------------------------------------------------

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Do ``job`` on the thread that owns the model; the future is cancelled if the worker ends first."""
        return self._thread.submit(job)

    def pause(self, pending: PendingPolicy, pause: object) -> Future[None]:
        """Run no more passes, once the future resolves, until ``resume``; ``pending`` is as in ``paused``."""
        self._pauses.add(pause)
        if pending == "wait":
            return self._thread.submit(partial(self._serve_pending_and_hold, pause))
        if pending == "reject":
            self._admission.refuse(pause)
        self._thread.hold(pause)
        return self._thread.submit(self._reject_pending if pending == "reject" else _nothing)

    def resume(self, pause: object) -> None:
        """Undo a ``pause``, also one that has not come about yet; idempotent."""
        self._pauses.discard(pause)
        self._admission.accept(pause)
        self._thread.let_go(pause)

    def _reject_pending(self) -> None:
        left = self._transport.pending()  # before the look: if the pause was given up, what comes now must be served
        while left > 0 and self._admission.refusing:
            requests = self._transport.take(min(left, self._rule.max_batch_size))
            self._transport.fail_batch(requests, [self._admission.paused() for _ in requests])
            left = self._transport.pending() if requests else 0

    def _serve_pending_and_hold(self, pause: object) -> None:
        left = self._transport.pending()  # those that come meanwhile wait
        try:
            while (
                left > 0
                and not self._thread.is_held  # by another pause, for which they wait
                and self._transport.wait_for_pending(1, 1, 0.0)
                and not self._admission.closed
            ):
                if requests := self._transport.take(min(left, self._rule.max_batch_size)):
                    self._answer(requests, DispatchReason.DRAIN)
                    left -= len(requests)
        finally:
            self._thread.hold(pause)
            if pause not in self._pauses:  # it was given up meanwhile
                self._thread.let_go(pause)

    # -- wait, take, forward, answer -------------------------------------------------------------------

    def _serve_next(self) -> None:
        transport, rule = self._transport, self._rule
        enough = self._enough()
        pending = transport.wait_for_pending(1, enough, 0.0 if self._draining else None)
        if pending == 0:
            if self._draining:
                self._thread.stop()
            return
        callers, waited = transport.callers(), transport.waited()
        reason = rule.decide(pending=pending, waited=waited, callers=callers, draining=self._draining)
        if reason is None:
            transport.wait_for_pending(rule.wanted(callers), enough, rule.timeout - waited)
        elif requests := transport.take(rule.max_batch_size):
            self._answer(requests, reason)

    def _enough(self) -> int:
        """How many pending requests let a pass begin while callers that were answered have not run yet."""
        self._by_turns = self._pass_alone <= _SHORT_PASS or self._passes % _LOOK_AGAIN == 0
        return sys.maxsize if self._by_turns else self._rule.max_batch_size

    def _answer(self, requests: Sequence[Request], reason: DispatchReason) -> None:
        """Run the model over claimed requests; each of them is settled when this returns, whatever was raised."""
        taken_at = time.perf_counter()
        with self._lock:
            abandoned = self._abandoned
            self._unsettled = () if abandoned else requests
        if abandoned is not None:  # between taking the requests and now
            self._fail(requests, abandoned)
            return
        try:
            for outcome in self._forward(requests):
                self._passes += 1
                if self._by_turns:
                    self._pass_alone = outcome.seconds
                if not self._claim(outcome):  # abandoned, and what is left need not be computed
                    return
                self._settle(outcome, reason, taken_at)
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

    def _record(self, outcome: Outcome, reason: DispatchReason, taken_at: float) -> None:
        # Before the replies leave, so that a caller who has its reply finds it in the statistics.
        self._stats.batch(
            reason=reason,
            submitted_at=[request.submitted_at for request in outcome.requests],
            taken_at=taken_at,
            forward=outcome.seconds,
            settled_at=time.perf_counter(),
            ok=outcome.error is None,
            cancelled=sum([request.receiver.done() for request in outcome.requests if request.outlet is not None]),
        )

    def _settle(self, outcome: Outcome, reason: DispatchReason, taken_at: float) -> None:
        """Settle requests that are claimed of those that are unsettled."""
        failure = outcome.error
        try:
            self._record(outcome, reason, taken_at)
            if outcome.replies is not None:
                self._transport.resolve_batch(outcome.requests, outcome.replies)
        except BaseException as error:
            _log.exception("replies could not be handed over")
            failure = failure or error
        if failure is not None:
            self._fail(outcome.requests, failure)

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        if requests:
            try:
                self._transport.fail_batch(requests, [clone_exception(error) for _ in requests])
            except BaseException:
                _log.exception("the transport could not hand errors over")


def _nothing() -> None:
    """A job of the model thread that tells when it has come this far."""
