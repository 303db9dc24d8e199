"""What runs in a process that serves: an event loop with the server, and the line to the parent."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import anyio
import anyio.to_thread

from aioinfer.errors import ModelError, ServerClosedError, WeightSyncError, clone_exception
from aioinfer.health import Health
from aioinfer.hosting.orders import FromChild, FromParent, Order, VersionPage
from aioinfer.ipc.pickling import dump_exception, dumps, loads
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.sockets import NUMBER, FramedSocket, frame, header
from aioinfer.pause import PendingPolicy
from aioinfer.server import InferenceServer
from aioinfer.stats import ServerStats
from aioinfer.weight_sync.snapshot import SnapshotReader
from aioinfer.weight_sync.weights import to_strategy

__all__ = ["run"]

# Seconds that the worker has to finish its batch when the parent is gone, and then the process to end.
_ORPHANED = 1.0
_PARTING = 1.0


def run(control: socket.socket, order: Order) -> None:
    """Serve until the parent says otherwise, or is gone.

    Args:
        control: to the parent.
        order: what is to be served.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the handlers of its parent
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control.set_inheritable(False)
    wire = FramedSocket(control)
    threading.Thread(target=_end_with_parent, args=(control,), name="aioinfer-parent", daemon=True).start()
    desk: _Desk | None = None
    try:
        served = order.opened()
        transports = [given.take() for given in served.transports]  # first: a factory that forks must not hold sockets
        model = served.policy_factory()
        if not callable(model):
            raise TypeError(f"policy_factory must return a model, which is callable; got {type(model).__qualname__}")
        transport = transports[0] if len(transports) == 1 else transports
        server = InferenceServer(model, transport, **served.options)
        desk = _Desk(wire, server, served.updates, served.version)
        asyncio.run(desk.live())
    except BaseException as error:
        if desk is not None and desk.serves:
            raise
        _fail(wire, error)
    if desk.is_stuck:
        os._exit(0)  # the thread of its model must not see the interpreter go down
    _hurry()


def _end_with_parent(control: socket.socket) -> None:
    """End the process if the parent does, whatever its other threads do, as long as they let go of the interpreter."""
    poll = select.poll()
    poll.register(control, 0)  # wakes when the other end is closed, not when it says something
    poll.poll()
    time.sleep(_ORPHANED + _PARTING)
    os._exit(1)


def _fail(wire: FramedSocket, error: BaseException) -> NoReturn:
    """Tell the parent why the process can't start, and end it."""
    text, original = f"{type(error).__qualname__}: (its message can't be shown)", None
    with suppress(BaseException):  # an exception of the user's may do anything where it is shown or pickled
        text = "".join(traceback.format_exception(error))
        original = dump_exception(error) if isinstance(error, Exception) else None
    wire.send(frame(header(FromChild.FAILED), dumps((text, original))))
    _flush(wire)
    _hurry()
    sys.exit(1)


def _hurry() -> None:
    """Have the interpreter end without looking for garbage among all that torch has made: 0.1 s instead of 0.8 s."""
    gc.freeze()


def _flush(wire: FramedSocket) -> None:
    while wire.unsent:
        wire.wait_writable(None)
        wire.flush()


class _Desk:
    """Does what the parent says, beside the server. Event loop only.

    Args:
        wire: to the parent.
        server: has not started.
        updates: where weights come.
        page: where the parent finds the version of the weights.

    Attributes:
        serves: whether the server has started.
        is_stuck: whether it was shut down and its worker goes on all the same.
    """

    def __init__(
        self, wire: FramedSocket, server: InferenceServer, updates: DescriptorQueue, page: VersionPage
    ) -> None:
        self.serves = self.is_stuck = False
        self._wire = wire
        self._server = server
        self._updates = updates
        self._reader = SnapshotReader()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pauses: dict[int, asyncio.Task[None]] = {}  # by the number of the command
        server._updates.on_version = page.write

    async def live(self) -> None:
        """Serve, and say so, until the parent has said otherwise, or is gone."""
        self._loop = asyncio.get_running_loop()
        self._copying = anyio.CapacityLimiter(1)  # of our own: the threads of the model's code may all be busy
        self._end: asyncio.Future[tuple[float | None, bool] | None] = self._loop.create_future()
        await self._server.__aenter__()
        self.serves = True
        self._loop.add_reader(self._wire, self._read)
        self._send(FromChild.READY)
        terms = await self._end
        timeout, drain = terms or (_ORPHANED, False)
        await self._server.aclose(timeout, drain=drain)
        self.is_stuck = self._server.is_alive
        if terms is None:
            os._exit(1)
        for pausing in self._pauses.values():
            pausing.cancel()
        if self._tasks and not self.is_stuck:
            await asyncio.wait(self._tasks)
        _flush(self._wire)

    # -- the line to the parent ------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            _, frames = self._wire.receive()
        except EOFError:
            self._loop.remove_reader(self._wire)
            self._finish(None)
            return
        for text, payload in frames:
            command, number, arguments = FromParent(text >> 60), text & NUMBER, loads(payload or b"")
            if command is FromParent.SHUTDOWN:
                self._finish(arguments)
                continue
            pauses = command is FromParent.PAUSE
            task = self._do_beside(
                self._pause(number, *arguments) if pauses else self._answer(command, number, arguments)
            )
            if pauses:
                self._pauses[number] = task

    def _finish(self, terms: tuple[float | None, bool] | None) -> None:
        if not self._end.done():
            self._end.set_result(terms)
        elif terms is not None:  # sooner than was said before, or without serving what is pending
            timeout, drain = terms
            self._do_beside(self._server.aclose(timeout, drain=drain))

    def _do_beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, kind: FromChild, number: int = 0, payload: bytes = b"") -> None:
        self._wire.send(frame(header(kind, number), payload))
        if self._wire.unsent:
            self._loop.add_writer(self._wire, self._send_rest)

    def _send_rest(self) -> None:
        self._wire.flush()
        if not self._wire.unsent:
            self._loop.remove_writer(self._wire)

    # -- commands --------------------------------------------------------------------------------------

    async def _answer(self, command: FromParent, number: int, arguments: tuple[Any, ...]) -> None:
        try:
            answer = dumps(await self._do(command, *arguments))
        except BaseException as error:  # also what a module raises that is given its extra state
            if self._end.done() and isinstance(error, asyncio.CancelledError):
                raise  # the event loop goes down
            late = self._end.done() and not self._server.is_alive
            self._fail(number, ServerClosedError("the server was shut down meanwhile") if late else error)
        else:
            self._send(FromChild.ANSWER, number, answer)

    def _fail(self, number: int, error: BaseException) -> None:
        try:
            payload = dump_exception(clone_exception(error))
        except BaseException:  # an exception of the user's may do anything where it is shown
            payload = dump_exception(ModelError(f"{type(error).__qualname__}: (its message can't be shown)"))
        self._send(FromChild.ERROR, number, payload)

    async def _do(self, command: FromParent, *arguments: Any) -> Health | ServerStats | None:
        if command is FromParent.STATS:
            return self._server.stats(reset=arguments[0])
        if command is FromParent.HEALTH:
            return self._health()
        await (self._resume if command is FromParent.RESUME else self._update)(*arguments)
        return None

    async def _pause(self, number: int, pending: PendingPolicy) -> None:
        """Pause until cancelled, which may be before it has begun."""
        try:
            async with self._server.paused(pending):
                self._send(FromChild.ANSWER, number, dumps(None))
                await self._loop.create_future()
        except Exception as error:
            self._fail(number, error)

    async def _resume(self, number: int) -> None:
        pausing = self._pauses.pop(number, None)
        if pausing is not None:
            pausing.cancel()
            await asyncio.wait([pausing])
            self._send(FromChild.ANSWER, number, dumps(None))  # if nobody has got one: the parent reads the first only

    async def _update(self, cast: bool) -> None:
        try:
            publication = self._updates.get_nowait()
            weights = to_strategy(self._reader.read(publication), "state_dict")
        except Exception as error:  # no descriptor is left for them, most likely
            raise WeightSyncError(f"the weights did not arrive: {type(error).__qualname__}: {error}") from error
        update = partial(self._server.update_weights, weights, version=publication.version, cast=cast)
        # It copies them first, which may take longer than a parent waits.
        await anyio.to_thread.run_sync(update, limiter=self._copying)

    def _health(self) -> Health:
        return replace(self._server.health(), alive=True)  # that of the process, which answers
