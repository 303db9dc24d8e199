"""The server's process: it runs an event loop with the server, and executes the commands of its parent."""

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
from aioinfer.ipc.pickling import dump_exception, dumps, loads
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.sockets import NUMBER, FramedSocket, frame, header
from aioinfer.model_thread import PendingPolicy
from aioinfer.process_server.protocol import Command, Response, ServerConfig, SharedVersion
from aioinfer.server import InferenceServer
from aioinfer.stats import Health, ServerStats
from aioinfer.weight_sync.snapshot import SnapshotReader
from aioinfer.weight_sync.weights import to_strategy

__all__ = ["ORPHAN_GRACE", "CommandLoop", "run"]

# Seconds that the server has to shut down when the parent is gone.
_ORPHAN_TIMEOUT = 1.0
ORPHAN_GRACE = 1.0
"""Seconds that its process then has to exit."""


def run(control: socket.socket, config: ServerConfig) -> None:
    """Run the server until the parent sends ``SHUTDOWN``, or is gone.

    Args:
        control: the connection to the parent.
        config: of the server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the handlers of its parent
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control.set_inheritable(False)
    sock = FramedSocket(control)
    threading.Thread(target=_exit_with_parent, args=(control,), name="aioinfer-parent", daemon=True).start()
    commands: CommandLoop | None = None
    try:
        config.load()
        transports = [given.take() for given in config.transports]  # first: a factory that forks must not hold sockets
        model = config.policy_factory()
        if not callable(model):
            raise TypeError(f"policy_factory must return a model, which is callable; got {type(model).__qualname__}")
        transport = transports[0] if len(transports) == 1 else transports
        server = InferenceServer(model, transport, **config.options)
        commands = CommandLoop(sock, server, config.updates, config.version)
        asyncio.run(commands.run())
    except BaseException as error:
        if commands is not None and commands.is_serving:
            raise
        _fail_to_start(sock, error)
    if commands.is_stuck:
        os._exit(0)  # the model thread still runs, and must not meet an interpreter that is finalized
    _skip_final_gc()


def _exit_with_parent(control: socket.socket) -> None:
    """Exit when the parent is gone, whatever the other threads do, as long as they release the GIL."""
    poll = select.poll()
    poll.register(control, 0)  # only POLLHUP: it returns at EOF, and not when there is data
    poll.poll()
    time.sleep(_ORPHAN_TIMEOUT + ORPHAN_GRACE)
    os._exit(1)


def _fail_to_start(sock: FramedSocket, error: BaseException) -> NoReturn:
    """Send the parent the error, and exit."""
    text, original = f"{type(error).__qualname__}: (its message can't be shown)", None
    with suppress(BaseException):  # an exception of the user's may raise anything where it is formatted or pickled
        text = "".join(traceback.format_exception(error))
        original = dump_exception(error) if isinstance(error, Exception) else None
    sock.send(frame(header(Response.FAILED), dumps((text, original))))
    _flush(sock)
    _skip_final_gc()
    sys.exit(1)


def _skip_final_gc() -> None:
    """Exempt all objects from the garbage collection at exit, which takes 0.7 s with all that torch has made."""
    gc.freeze()


def _flush(sock: FramedSocket) -> None:
    while sock.unsent:
        sock.wait_writable(None)
        sock.flush()


class CommandLoop:
    """Executes the parent's commands, beside the server. The event loop's thread owns it.

    Args:
        sock: the connection to the parent.
        server: not started yet.
        updates: the queue for snapshots of weights.
        version: where the version of the weights in use is written.

    Attributes:
        is_serving: whether the server has started.
        is_stuck: whether the server was shut down and its model thread still runs.
        sock: as given.
    """

    def __init__(
        self, sock: FramedSocket, server: InferenceServer, updates: DescriptorQueue, version: SharedVersion
    ) -> None:
        self.is_serving = self.is_stuck = False
        self.sock = sock
        self._server = server
        self._updates = updates
        self._reader = SnapshotReader()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pauses: dict[int, asyncio.Task[None]] = {}  # by the number of the command
        server._updates.on_update = lambda number, _: version.write(number)

    async def run(self) -> None:
        """Serve until the parent sends ``SHUTDOWN``, or is gone."""
        self._loop = asyncio.get_running_loop()
        self._limiter = anyio.CapacityLimiter(1)  # a thread of our own: the model may use all of the usual ones
        self._shutdown_args: asyncio.Future[tuple[float | None, bool] | None] = self._loop.create_future()
        await self._server.__aenter__()
        self.is_serving = True
        self._loop.add_reader(self.sock, self._receive)
        self._send(Response.READY)
        shutdown_args = await self._shutdown_args
        timeout, drain = shutdown_args or (_ORPHAN_TIMEOUT, False)
        await self._server.aclose(timeout, drain=drain)
        self.is_stuck = self._server.is_alive
        if shutdown_args is None:
            os._exit(1)
        for pausing in self._pauses.values():
            pausing.cancel()
        if self._tasks and not self.is_stuck:
            await asyncio.wait(self._tasks)
        _flush(self.sock)

    # -- the connection --------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            _, frames = self.sock.receive()
        except EOFError:
            self._loop.remove_reader(self.sock)
            self._shutdown(None)
            return
        for head, payload in frames:
            command, number, arguments = Command(head >> 60), head & NUMBER, loads(payload or b"")
            if command is Command.SHUTDOWN:
                self._shutdown(arguments)
            elif command is Command.PAUSE:
                self._pauses[number] = self._create_task(self._pause(number, *arguments))
            elif command is Command.RESUME:
                pausing = self._pauses.pop(arguments[0], None)
                if pausing is not None:
                    pausing.cancel()  # at once: a command that was sent after this one finds the pause ended
                self._create_task(self._respond(command, number, (*arguments, pausing)))
            else:
                self._create_task(self._respond(command, number, arguments))

    def _shutdown(self, shutdown_args: tuple[float | None, bool] | None) -> None:
        if not self._shutdown_args.done():
            self._shutdown_args.set_result(shutdown_args)
        elif shutdown_args is not None:  # a second command with a shorter timeout, or without drain
            timeout, drain = shutdown_args
            self._create_task(self._server.aclose(timeout, drain=drain))

    def _create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, kind: Response, number: int = 0, payload: bytes = b"") -> None:
        self.sock.send(frame(header(kind, number), payload))
        if self.sock.unsent:
            self._loop.add_writer(self.sock, self._send_rest)

    def _send_rest(self) -> None:
        self.sock.flush()
        if not self.sock.unsent:
            self._loop.remove_writer(self.sock)

    # -- commands --------------------------------------------------------------------------------------

    async def _respond(self, command: Command, number: int, arguments: tuple[Any, ...]) -> None:
        try:
            result = dumps(await self._execute(command, *arguments))
        except BaseException as error:  # of a module's set_extra_state, too
            if self._shutdown_args.done() and isinstance(error, asyncio.CancelledError):
                raise  # the event loop is closing
            late = self._shutdown_args.done() and not self._server.is_alive
            self._send_error(number, ServerClosedError("the server was shut down meanwhile") if late else error)
        else:
            self._send(Response.RESULT, number, result)

    def _send_error(self, number: int, error: BaseException) -> None:
        try:
            payload = dump_exception(clone_exception(error))
        except BaseException:  # an exception of the user's may raise anything where it is formatted
            payload = dump_exception(ModelError(f"{type(error).__qualname__}: (its message can't be shown)"))
        self._send(Response.ERROR, number, payload)

    async def _execute(self, command: Command, *arguments: Any) -> Health | ServerStats | None:
        if command is Command.STATS:
            return self._server.stats(reset=arguments[0])
        if command is Command.HEALTH:
            return replace(self._server.health(), alive=True)  # of the process
        await (self._resume if command is Command.RESUME else self._update)(*arguments)
        return None

    async def _pause(self, number: int, pending: PendingPolicy) -> None:
        """Pause until cancelled; the task may be cancelled before it has started."""
        try:
            async with self._server.paused(pending):
                self._send(Response.RESULT, number, dumps(None))
                await self._loop.create_future()
        except Exception as error:
            self._send_error(number, error)

    async def _resume(self, number: int, pausing: asyncio.Task[None] | None) -> None:
        if pausing is not None:
            await asyncio.wait([pausing])
            self._send(Response.RESULT, number, dumps(None))  # if none was sent: the parent reads the first one only

    async def _update(self, cast: bool) -> None:
        try:
            ref = self._updates.get_nowait()
            weights = to_strategy(self._reader.read(ref), "state_dict")
        except Exception as error:  # mostly because no descriptor is free
            raise WeightSyncError(f"the weights did not arrive: {type(error).__qualname__}: {error}") from error
        update = partial(self._server.update_weights, weights, version=ref.version, cast=cast)
        # In a thread: it copies the weights first, which may take longer than a parent waits.
        await anyio.to_thread.run_sync(update, limiter=self._limiter)
