"""The one thread that owns the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from aioinfer.futures import Future
from aioinfer.wakers import LockWaker

__all__ = ["ModelThread"]


class ModelThread:
    """Prepares the model, then serves one batch after the other, and does jobs in between.

    Whatever touches the model runs here. So the model needs no lock, and nothing changes it during a
    forward pass.

    The thread waits for requests itself instead of being handed each batch by the event loop: a lone
    caller saves a wake-up of the loop, and under load the loop is woken for replies only.

    Any thread: the public methods. Model thread only: ``_run``, and the callables. There is no lock: jobs and reasons
    to hold are each added and removed in one step.

    Args:
        prepare: called first.
        serve: waits for requests and answers a batch of them; returns early when ``wake`` was called.
        wake: makes a running ``serve`` or ``stand_by``, or else the next one, return early.
        stand_by: called instead of ``serve`` while the thread is held; gets a bell that rings when it is to return.
        ended: called last, with the error that ended the thread, if one did.
        name: the thread's name.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[], None],
        serve: Callable[[], None],
        wake: Callable[[], None],
        stand_by: Callable[[LockWaker], None],
        ended: Callable[[BaseException | None], None],
        name: str,
    ) -> None:
        self._prepare = prepare
        self._serve = serve
        self._wake = wake
        self._stand_by = stand_by
        self._ended = ended
        self._stopping = False
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._over = False
        self._holds: set[object] = set()
        self._news = LockWaker()  # of jobs, of a hold that is over, or of the end
        self._prepared: Future[None] = Future()
        # A daemon: a program that ends without shutting its server down must not hang.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Future[None]:
        """Start the thread, once; the future resolves when the model is prepared, or fails if it can't be."""
        self._thread.start()
        return self._prepared

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Do ``job`` on the thread, before the next batch; the future is cancelled if the thread ends first.

        Raises:
            RuntimeError: called on this very thread, so that to wait for the future would never end.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("the model, and callbacks of its requests, can't wait for a pass to end, as updates do")
        future: Future[None] = Future()
        self._jobs.append((job, future))
        self._notify()
        if self._over:  # perhaps too late for the thread to see it
            self._cancel_jobs()
        return future

    def hold(self, reason: object) -> None:
        """A job: serve no batch from now on, until ``let_go`` was called for each reason."""
        self._holds.add(reason)

    def let_go(self, reason: object) -> None:
        """Undo a ``hold``; idempotent."""
        self._holds.discard(reason)
        self._notify()

    @property
    def is_held(self) -> bool:
        """Whether no batch is to be served."""
        return bool(self._holds)

    def stop(self) -> None:
        """End the thread after the batch that runs now."""
        self._stopping = True
        self._notify()

    def join(self, timeout: float | None) -> None:
        """Wait for the end of the thread; returns at once on the thread itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _notify(self) -> None:
        self._news.notify()
        self._wake()

    @torch.no_grad()
    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._prepare()
            self._prepared.settle(None, None)
            while not self._stopping:
                self._do_jobs()
                if self._stopping:  # a job may have heard the bell that told of it
                    break
                if self._holds:
                    self._stand_by(self._news)
                else:
                    self._serve()
        except BaseException as caught:
            error = caught
        finally:
            self._over = True
            self._cancel_jobs()
            self._ended(error)
            if error is not None:
                self._prepared.settle(None, error)

    def _cancel_jobs(self) -> None:
        while self._jobs:
            try:
                _, future = self._jobs.popleft()
            except IndexError:  # another thread was quicker
                return
            future.cancel()

    def _do_jobs(self) -> None:
        while self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    job()
                except BaseException as error:  # whoever waits for the job is told; it must not end the thread
                    future.set_exception(error)
                else:
                    future.set_result(None)
