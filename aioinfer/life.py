"""The life of a server: embedded in a running event loop, or hosted in a background thread."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import anyio.to_thread
from anyio.from_thread import start_blocking_portal

from aioinfer.errors import ServerClosedError
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport
from aioinfer.worker import Worker

__all__ = ["ServerLife"]


class ServerLife(ABC):
    """Starts and ends a server's worker, and the task that stands for it on an event loop.

    Args:
        transport: what the worker serves.
    """

    def __init__(self, transport: InferenceTransport) -> None:
        self.transport = transport
        self._lock = threading.Lock()  # guards the attributes below
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
    async def _accompany(self, worker: Worker) -> None:
        """What runs on the event loop while the worker serves; it is cancelled when the worker has ended."""

    @property
    def is_alive(self) -> bool:
        """Whether the server's worker runs. It may outlive a ``shutdown`` that did not wait for it."""
        worker = self._worker
        return worker is not None and worker.is_alive()

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
        if self._host is not None:
            await anyio.to_thread.run_sync(lambda: self.shutdown(timeout, drain=drain))
            return
        error = self._refuse(drain)
        worker, task = self._worker, self._task
        if worker is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(asyncio.wrap_future(worker.ended))
        except TimeoutError:
            pass
        finally:
            worker.abandon(error)
        if worker.ended.done():
            worker.join(None)  # of the thread, no more than its return is left
            if task is not None and task.get_loop() is asyncio.get_running_loop():
                await asyncio.wait([task])

    async def _open(self) -> None:
        worker, opened = self._start_worker()
        self._task = asyncio.get_running_loop().create_task(self._live(worker), name="aioinfer-server")
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            await self.aclose()
            raise

    async def _live(self, worker: Worker) -> None:
        """The server's task: it ends with the worker, or ends it when its event loop goes down first."""
        company = asyncio.get_running_loop().create_task(self._accompany(worker), name="aioinfer-server-company")
        try:
            await asyncio.shield(asyncio.wrap_future(worker.ended))
        finally:
            worker.close(_closed(), drain=False)
            company.cancel()
            await asyncio.wait([company])

    # -- hosted in a background thread -----------------------------------------------------------------

    def start(self) -> Self:
        """Start the server on an event loop in a background thread.

        Raises:
            RuntimeError: it runs already, or its last worker has not ended yet.
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

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once.
        """
        if self._process != os.getpid():  # a forked child, which has none of the server's threads
            return
        atexit.unregister(self.shutdown)
        error = self._refuse(drain)
        worker = self._worker
        if worker is not None and not worker.join(timeout):
            worker.abandon(error)
        with self._lock:
            host, self._host = self._host, None
        if host is not None:
            host.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- both ------------------------------------------------------------------------------------------

    def _open_transport(self) -> Admission:
        admission = self._make_admission()
        self.transport.open(admission)
        return admission

    def _start_worker(self) -> tuple[Worker, Future[None]]:
        with self._lock:
            if self.is_alive:
                raise RuntimeError("the server runs already, or its worker has not ended since the last shutdown")
            if self._admission.closed is not None or self._admission.superseded:
                self._admission = self._open_transport()
            self._worker = self._make_worker(self._admission)
            return self._worker, self._worker.start()

    def _running(self) -> Worker:
        worker = self._worker
        if worker is None or not worker.is_alive():
            raise RuntimeError("the server does not run")
        return worker

    def _refuse(self, drain: bool) -> ServerClosedError:
        error = _closed()
        if self._worker is not None and self._worker.is_alive():
            self._worker.close(error, drain=drain)
        elif not self._admission.superseded:
            self.transport.finish(error)
        return error


def _closed() -> ServerClosedError:
    return ServerClosedError("the server is shut down")
