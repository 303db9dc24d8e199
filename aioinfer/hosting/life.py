"""The life of a process that serves: its start and its end."""

from __future__ import annotations

import asyncio
import atexit
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from aioinfer.devices import Model
from aioinfer.errors import ServerClosedError, ServerStartError
from aioinfer.hosting.child import run
from aioinfer.hosting.deliveries import Deliveries
from aioinfer.hosting.hotline import Hotline
from aioinfer.hosting.orders import Order
from aioinfer.hosting.process import ChildProcess, handed_over
from aioinfer.transports.processes import ProcessTransport
from aioinfer.transports.wire import Wire
from aioinfer.weight_sync.queues import DescriptorQueue

__all__ = ["ProcessLife"]

# Seconds that a process has to end after its server did.
_PARTING = 2.0


class ProcessLife:
    """Starts a server's process, and ends it.

    Args:
        policy_factory: makes the model, in the process.
        transport: what is served.
        context: starts the process.
        startup_timeout: seconds that the process has to serve; ``None`` waits for ever.
        options: of the server.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Model],
        transport: ProcessTransport,
        *,
        context: BaseContext,
        startup_timeout: float | None,
        options: Mapping[str, Any],
    ) -> None:
        self.transport = transport
        self.startup_timeout = startup_timeout
        self._factory = policy_factory
        self._options = options
        self._context = context
        self._lock = threading.Lock()  # guards the attributes below
        self._begun = self._closed = False
        self._hotline: Hotline | None = None
        self._deliveries: Deliveries | None = None

    def __getstate__(self) -> Any:
        raise TypeError("a ProcessInferenceServer can't be handed to another process; hand it clients")

    def start(self) -> Self:
        """Start the process, and return when it serves.

        Raises:
            ServerStartError: it can't, or died; the message has its traceback if there is one, or how it ended.
            TimeoutError: it does not serve within ``startup_timeout``; it was killed.
            RuntimeError: it was started before, or the transport is in use.
            ServerClosedError: it was shut down meanwhile.
        """
        hotline = self._launch()
        try:
            hotline.ready.result(self.startup_timeout)
        except BaseException as error:
            late = isinstance(error, TimeoutError) and not hotline.ready.done()
            hotline.close(0.0, drain=False)
            self._see_the_end(hotline, _PARTING)
            if late:
                raise TimeoutError(f"the server does not serve within {self.startup_timeout:g} seconds") from None
            raise
        return self

    async def astart(self) -> Self:
        """Do as :meth:`start`, without blocking the event loop. If it is cancelled, the process is killed."""
        starting = asyncio.ensure_future(anyio.to_thread.run_sync(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            with self._lock:
                self._closed = True  # also where the thread has not come that far
            self._close(0.0, drain=False)
            with anyio.CancelScope(shield=True):
                await asyncio.wait([starting])
                starting.cancelled() or starting.exception()
                await self.aclose(0.0)
            raise
        return self

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Shut the server down as :meth:`InferenceServer.shutdown` does, and end its process. Idempotent.

        A process that has not ended two seconds past ``timeout`` is killed; one that has not begun to serve, at once.
        Nothing happens to a server that was not started.

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once.
        """
        hotline = self._close(timeout, drain=drain)
        if hotline is not None:
            self._see_the_end(hotline, None if timeout is None else timeout + _PARTING)

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and nobody waits for it.
        """
        self._close(timeout, drain=drain)  # first: where it is cancelled already, the next line does nothing
        await anyio.to_thread.run_sync(partial(self.shutdown, timeout, drain=drain))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return await self.astart()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _launch(self) -> Hotline:
        with self._lock:
            if self._begun:
                raise RuntimeError(
                    "the server was started before, and its transport went with its process; "
                    "make another server, with another transport"
                )
            if self._closed:
                raise ServerClosedError("the start of the server was cancelled")
            given = self.transport.give_away()
            self._begun = True
        ours, theirs = socket.socketpair()
        wire, queue = Wire(ours), DescriptorQueue()
        order = Order(self._factory, self._options, given, queue)
        try:
            with handed_over(theirs.close, given.close):
                process = ChildProcess(self._context, run, (theirs, order))
        except Exception as error:
            wire.close()
            raise ServerStartError(
                f"the server's process could not be started: {type(error).__qualname__}: {error}"
            ) from error
        hotline = Hotline(wire, process)
        with self._lock:
            self._hotline, self._deliveries = hotline, Deliveries(hotline, queue)
            closed = self._closed
        atexit.register(self.shutdown, 1.0)
        if closed:
            hotline.close(0.0, drain=False)
        return hotline

    def _close(self, timeout: float | None, *, drain: bool) -> Hotline | None:
        with self._lock:
            self._closed |= self._begun
            hotline = self._hotline
        if hotline is not None:
            hotline.close(timeout, drain=drain)
        return hotline

    def _see_the_end(self, hotline: Hotline, timeout: float | None) -> None:
        if hotline.wait(timeout):
            atexit.unregister(self.shutdown)
            self._deliveries = None  # and the memory of the weights

    def _running(self) -> tuple[Hotline, Deliveries]:
        """The ways to the process; raise why there are none."""
        hotline, deliveries = self._hotline, self._deliveries
        if hotline is None or not hotline.serves:
            raise RuntimeError("the server does not run")
        hotline.check()
        assert deliveries is not None  # until the hotline is closed
        return hotline, deliveries
