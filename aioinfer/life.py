"""The life of a server: embedded in a running event loop, or hosted in a background thread."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import start_blocking_portal

from aioinfer.errors import ServerClosedError, ServerNotRunningError, clone_exception
from aioinfer.futures import Future, run_in_thread
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import ServedTransport
from aioinfer.worker import Worker

__all__ = ["ServerLife"]

# Seconds until a companion of the worker that has failed runs again, the first time and at most.
_FIRST_RETRY = 0.1
_LAST_RETRY = 5.0

_log = logging.getLogger("aioinfer")


class ServerLife(ABC):
    """Starts and ends a server's worker, and the tasks that stand for it on an event loop.

    Any thread: the public methods. ``_lock`` guards which worker there is, and what hosts it.

    Args:
        transport: what the worker serves.
    """

    def __init__(self, transport: ServedTransport) -> None:
        self._transport = transport
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._host: ExitStack | None = None
        self._process = os.getpid()
        self._admission = self._open_transport()

    @abstractmethod
    def _make_admission(self) -> Admission:
        """The terms under which requests are taken."""

    @abstractmethod
    def _make_worker(self, admission: Admission) -> Worker:
        """A worker for one life; event loop only."""

    @abstractmethod
    def _companions(self, worker: Worker) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        """What runs on the event loop while the worker serves, by what it does; cancelled when the worker has ended."""

    @property
    def is_alive(self) -> bool:
        """Whether the server's worker runs. It may outlive a ``shutdown`` that did not wait for it."""
        worker = self._worker
        return worker is not None and worker.is_alive() and self._process == os.getpid()

    # -- in a running event loop -----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and nobody waits for its worker.
        """
        if self._process != os.getpid():
            return
        worker, task, error = self._worker, self._task, _closed()
        if worker is not None and worker.is_alive():
            worker.refuse(error)
        # In a thread of its own: those of a pool may all be callers that wait for this server.
        ending = run_in_thread(lambda: self.shutdown(timeout, drain=drain), "aioinfer-shutdown")
        try:
            await asyncio.wrap_future(ending)
        except asyncio.CancelledError:
            if worker is not None:
                run_in_thread(lambda: worker.abandon(error), "aioinfer-abandon")
            raise
        if task is not None and task.get_loop() is asyncio.get_running_loop() and not self.is_alive:
            await asyncio.wait([task])

    async def _open(self) -> None:
        worker, opened = self._start_worker()
        self._task = asyncio.get_running_loop().create_task(self._live(worker), name="aioinfer-server")
        try:
            await asyncio.wrap_future(opened)
            if (error := self._shut_down_with()) is not None:
                raise clone_exception(error)
        except BaseException:
            await self.aclose()
            raise

    async def _live(self, worker: Worker) -> None:
        """The server's task: it ends with the worker, or ends it when its event loop goes down first."""
        companions = [
            asyncio.get_running_loop().create_task(_keep_running(what, run), name=f"aioinfer-{what}")
            for what, run in self._companions(worker).items()
        ]
        try:
            await asyncio.shield(asyncio.wrap_future(worker.ended))
        finally:
            worker.close(_closed(), drain=False)
            for companion in companions:
                companion.cancel()
            await asyncio.wait(companions)

    # -- hosted in a background thread -----------------------------------------------------------------

    def start(self) -> Self:
        """Start the server on an event loop in a background thread.

        Raises:
            RuntimeError: it runs already, or its last worker has not ended yet.
            ServerClosedError: it was shut down meanwhile.
        """
        with ExitStack() as host:
            portal = host.enter_context(start_blocking_portal(name="aioinfer-loop"))
            portal.call(self._open)
            self._host = host.pop_all()
        atexit.register(self.shutdown, 1.0)
        return self

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Refuse new requests, fail or serve the pending ones, and end the worker. Idempotent.

        In a forked child of the process that made the server nothing happens.

        The batch that the model works on is finished and answered. Where that takes longer than ``timeout``,
        its requests are failed too, and the worker ends, unnoticed, when the model returns.

        A signal handler may call it, with a ``timeout``: a call that the handler has interrupted may have to go on
        before the worker can end.

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once. While the server is paused none is served, so the timeout passes.
        """
        if self._process != os.getpid():  # a forked child, which has none of the server's threads
            return
        error = self._refuse(drain)
        worker = self._worker
        if worker is not None and not worker.join(timeout):
            worker.abandon(error)
        with self._lock:
            host, self._host = self._host, None
        if host is not None:
            host.close()
        atexit.unregister(self.shutdown)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- both ------------------------------------------------------------------------------------------

    def _open_transport(self) -> Admission:
        admission = self._make_admission()
        self._transport.open(admission)
        return admission

    def _start_worker(self) -> tuple[Worker, Future[None]]:
        with self._lock:
            if self.is_alive:
                raise RuntimeError("the server runs already, or its worker has not ended since the last shutdown")
            if self._admission.closed is not None or self._admission.superseded:
                self._admission = self._open_transport()
            worker = self._make_worker(self._admission)
            opened = worker.start()
            self._process, self._worker = os.getpid(), worker
            if (error := self._shut_down_with()) is not None:  # by one that found no worker yet
                worker.close(error, drain=False)
            return worker, opened

    def _shut_down_with(self) -> ServerClosedError | None:
        """The error of a shutdown since the last start; a worker that died has left one with a cause instead."""
        error = self._admission.closed
        return error if error is not None and error.__cause__ is None else None

    def _running(self) -> Worker:
        worker = self._worker
        if worker is None or not self.is_alive:
            raise ServerNotRunningError("the server does not run; start it first")
        return worker

    def _refuse(self, drain: bool) -> ServerClosedError:
        error = _closed()
        started = self._close_worker(error, drain)
        if not started and not self._admission.superseded:
            self._transport.finish(error)
            self._close_worker(error, drain)  # one that was started meanwhile has not seen it
        return error

    def _close_worker(self, error: ServerClosedError, drain: bool) -> bool:
        worker = self._worker
        if worker is None or not worker.is_alive():
            return False
        worker.close(error, drain=drain)
        return True


async def _keep_running(what: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a companion of the worker until it returns; where it fails, say so and run it again."""
    pause = _FIRST_RETRY
    while True:
        try:
            await run()
        except (Exception, SystemExit):  # descriptors that have run out, or what unpickling has run
            _log.exception("%s failed; trying again in %g s", what, pause)
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_RETRY)


def _closed() -> ServerClosedError:
    return ServerClosedError("the server is shut down")
