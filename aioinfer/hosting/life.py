"""The life of a process that serves: its start and its end."""

from __future__ import annotations

import atexit
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Self

import anyio

from aioinfer.devices import Model
from aioinfer.errors import PeerDiedError, ServerClosedError
from aioinfer.hosting.child import run
from aioinfer.hosting.deliveries import Deliveries
from aioinfer.hosting.hotline import PARTING, Hotline
from aioinfer.hosting.orders import Order, Served, VersionPage
from aioinfer.hosting.process import ChildProcess, handed_over
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.sockets import FramedSocket
from aioinfer.transports.processes import GivenTransport, ProcessTransport

__all__ = ["ProcessLife"]

# Seconds that a process has to end once it is killed.
_KILLED = 1.0

_log = logging.getLogger("aioinfer")


class ProcessLife:
    """Starts a server's process, and ends it.

    Any thread: the public methods. The hotline's thread: ``_launch``, ``_decline``, ``_release``.

    Args:
        policy_factory: makes the model, in the process.
        transports: what is served.
        context: starts the process.
        startup_timeout: seconds that the process has to serve; ``None`` waits for ever.
        options: of the server.
        policy_version: of the weights that the model has at the start.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Model],
        transports: Sequence[ProcessTransport],
        *,
        context: BaseContext,
        startup_timeout: float | None,
        options: Mapping[str, Any],
        policy_version: int,
    ) -> None:
        self.transports = list(transports)
        self.transport = self.transports[0]
        self.startup_timeout = startup_timeout
        self._factory = policy_factory
        self._options = options
        self._context = context
        self._starters: deque[object] = deque()  # the first one is whose start it is
        self._hotline = Hotline(self._launch, self._decline, self._release)
        self._deliveries: Deliveries | None = None
        self._page: VersionPage | None = None
        self._version = policy_version  # where there is no page

    def __getstate__(self) -> Any:
        raise TypeError("a ProcessInferenceServer can't be handed to another process; hand it clients")

    # -- start -----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the process, and return when it serves.

        Raises:
            ServerStartError: it can't, or died; the message has its traceback if there is one, or how it ended.
            TimeoutError: it does not serve within ``startup_timeout``; it was killed.
            RuntimeError: it was started before, or a transport is in use.
            ServerClosedError: it was shut down, before or meanwhile.
        """
        starter = object()
        try:
            self._begin(starter)
            if not self._hotline.ready.wait_done(self.startup_timeout):
                raise self._late()
            self._hotline.ready.outcome()
        except BaseException:
            if self._is_started_by(starter):
                self._kill()
                self._hotline.ended.wait_done(PARTING + _KILLED)
            raise
        return self

    async def astart(self) -> Self:
        """Do as :meth:`start`, without blocking the event loop. If it is cancelled, the process is killed."""
        starter = object()
        try:
            self._begin(starter)
            if not await self._hotline.ready.await_done(self.startup_timeout):
                raise self._late()
            self._hotline.ready.outcome()
        except BaseException:
            if self._is_started_by(starter):
                self._kill()
                with anyio.CancelScope(shield=True):
                    await self._hotline.ended.await_done(PARTING + _KILLED)
            raise
        return self

    def _begin(self, starter: object) -> None:
        self._hotline.check_process()
        if not self._starters:
            if self._hotline.refusal is not None:
                raise ServerClosedError("the server was shut down before it started; make another server")
            for transport in self.transports:
                transport.check_unused()
        self._starters.append(starter)
        if not self._is_started_by(starter):
            raise RuntimeError(
                "the server was started before, and its transport went with its process; "
                "make another server, with another transport"
            )
        atexit.register(self.shutdown, 1.0)
        self._hotline.start()

    def _is_started_by(self, starter: object) -> bool:
        return bool(self._starters) and self._starters[0] is starter

    def _late(self) -> TimeoutError:
        return TimeoutError(f"the server does not serve within {self.startup_timeout:g} seconds")

    def _kill(self) -> None:
        self._hotline.close(0.0, drain=False)
        if not self._hotline.began:
            self._hotline.end_unlaunched()

    # -- end -------------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Shut the server down as :meth:`InferenceServer.shutdown` does, and end its process. Idempotent.

        A process that has not ended two seconds past ``timeout`` is killed; one that has not begun to serve, at once.
        A server that was not started can't start any more: requests that wait for it fail with
        :class:`ServerClosedError`. In a forked child of the process that made the server nothing happens.

        A signal handler may call it, whatever it interrupts.

        Args:
            timeout: seconds to wait for the worker; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once.
        """
        if not self._hotline.is_here:
            return
        self._hotline.close(timeout, drain=drain)
        if not self._hotline.began:
            self._hotline.end_unlaunched()
        self._hotline.ended.wait_done(None if timeout is None else timeout + PARTING + _KILLED)

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and nobody waits for it.
        """
        if not self._hotline.is_here:
            return
        self._hotline.close(timeout, drain=drain)
        if not self._hotline.began and not self._hotline.ended.done:
            threading.Thread(target=self._hotline.end_unlaunched, name="aioinfer-end", daemon=True).start()
        await self._hotline.ended.await_done(None if timeout is None else timeout + PARTING + _KILLED)

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

    # -- on the hotline's thread -----------------------------------------------------------------------

    def _launch(self) -> tuple[FramedSocket, ChildProcess]:
        inherited = ExitStack()  # what the process takes over; closed here, whether it starts or not
        with handed_over(inherited.close), ExitStack() as ours:
            parent, child = socket.socketpair()
            inherited.callback(child.close)
            wire = FramedSocket(parent)
            ours.callback(wire.close)
            queue = DescriptorQueue()
            ours.callback(queue.close)
            page = VersionPage(self._version)
            given: list[GivenTransport] = []
            for transport in self.transports:
                given.append(transport.give_away())
                inherited.callback(given[-1].close)
            order = Order(Served(self._factory, self._options, given, queue, page))
            process = ChildProcess(self._context, run, (child, order))
            ours.pop_all()
        self._queue, self._page = queue, page
        self._deliveries = Deliveries(self._hotline, queue)
        return wire, process

    def _decline(self, error: ServerClosedError) -> None:
        """Fail the requests that wait, and those to come, on transports that were not given to the process."""
        for transport in self.transports:
            if transport.is_served:
                continue
            try:
                transport.finish(error)
            except Exception:
                _log.exception("callers at %s may not have heard that their server does not start", transport.address)

    def _release(self) -> None:
        """Free what only a process that runs needs."""
        atexit.unregister(self.shutdown)
        if self._page is not None:
            self._version, self._page = self._page.read(), None
        if self._deliveries is not None:
            self._queue.close()
            self._deliveries = None  # and the memory of the weights

    def _running(self) -> tuple[Hotline, Deliveries]:
        """The ways to the process; raise why there are none."""
        hotline, deliveries = self._hotline, self._deliveries
        hotline.check()
        if deliveries is None:
            raise PeerDiedError("the server's process is gone")
        return hotline, deliveries
