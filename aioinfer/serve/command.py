"""``aioinfer serve``: a policy that is loaded, served, and drained at the end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from aioinfer.errors import InferenceError, ServerStartError, describe
from aioinfer.futures import run_in_thread
from aioinfer.interrupts import INTERRUPTED
from aioinfer.ipc.pickling import loads
from aioinfer.process_server import ProcessInferenceServer
from aioinfer.serve.announcement import announce, url_of
from aioinfer.serve.guard import ConnectionGuard
from aioinfer.serve.listener import AddressError, Listener, unlink
from aioinfer.serve.loading import LoadError, PolicyFactory, PolicyInfo, one_line
from aioinfer.serve.settings import Settings, UsageError, read_settings
from aioinfer.serve.starting import StartingApp
from aioinfer.server import InferenceServer
from aioinfer.transports import MPTransport, ThreadingTransport
from aioinfer.web.access import Access
from aioinfer.web.app import App, create_app
from aioinfer.web.limits import BytesInFlight

__all__ = ["Service", "serve"]

_CLOSE_GRACE = 1.0  # seconds for connections to end, once their requests are answered
_LOOK_EVERY = 0.1  # seconds: whether the server lives
_SPARE_DESCRIPTORS = 256  # for files, and the processes that the server may have
_MOST_DESCRIPTORS = 2**16

Server = InferenceServer | ProcessInferenceServer

_log = logging.getLogger("aioinfer.serve")


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal ends it; return the exit status. Main thread only."""
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    sockets: list[socket.socket] = []
    try:
        settings = read_settings(options)
        sockets = settings.bind()
    except (UsageError, AddressError) as error:
        print(f"aioinfer serve: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    inode = None if settings.uds is None else os.lstat(settings.uds).st_ino
    loop_factory = uvicorn.Config(_no_app, log_config=None).get_loop_factory()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            service = Service(settings, sockets, say=partial(print, flush=True))
            status = runner.run(_until_signal(service, partial(_remove_socket, settings, inode)))
    finally:
        _remove_socket(settings, inode)
    if not service.is_loading:
        gc.freeze()  # else the interpreter looks at all that torch has made once more, which takes a second
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread still loads, and must not meet an interpreter that is finalized


async def _no_app(*_: Any) -> None:
    """Stands for the app where there is none yet."""


def _remove_socket(settings: Settings, inode: int | None) -> None:
    if settings.uds is not None and inode is not None:
        unlink(settings.uds, inode)


async def _until_signal(service: Service, clean_up: Callable[[], None]) -> int:
    """Run until SIGTERM or Ctrl-C; a Ctrl-C after one of them ends the process at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, end)  # as it comes, whatever the event loop does
        service.stop()

    def end(*_: object) -> None:
        clean_up()
        os._exit(INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    return await service.run()


class Service:
    """A policy at an address, from its loading to its end.

    Loop thread only.

    Args:
        settings: of the service.
        sockets: bound; it closes them.
        say: prints for the user.

    Attributes:
        is_loading: whether a thread still makes the policy, which nothing can stop.
        ready: set when requests are served.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self.is_loading = False
        self.ready = asyncio.Event()
        self._settings = settings
        self._say = say
        self._url = url_of(settings, sockets[0])
        self._starting_app = StartingApp(Access(settings.tokens, settings.hosts, settings.origins), settings.limits)
        in_flight = BytesInFlight(settings.limits.max_bytes_in_flight)
        self._guard = ConnectionGuard(
            max_connections=_max_connections(settings.limits.max_connections), bytes_in_flight=in_flight
        )
        self._listener = Listener(
            self._starting_app,
            sockets,
            guard=self._guard,
            limits=settings.limits,
            tls=settings.tls,
            log_level="debug" if settings.log_level == "debug" else "warning",
            app_that_serves=lambda: self._starting_app.app,
        )
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End: drain, and close."""
        self._stopping.set()

    async def run(self) -> int:
        """Serve until :meth:`stop`; return the exit status."""
        settings = self._settings
        await self._listener.open()
        self._say(f"loading {settings.source.reference}; listening at {settings.uds or self._url}")
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        server: Server | None = None
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                self._starting_app.end("the server is shutting down")
                return 0
            try:
                server, info, app = await starting
            except Exception as error:
                self._starting_app.end("the policy could not be loaded")
                self._tell(error)
                return 1
            self._say(announce(settings, info, self._url))
            gc.freeze()  # what torch has made stays: to look at it now and then would stop all callers for a while
            self.ready.set()
            died = await self._watch(server, stopping)
            await self._drain(app, server)
            return 1 if died else 0
        finally:
            stopping.cancel()
            starting.cancel()
            await asyncio.wait([starting, stopping])
            await self._listener.close(_CLOSE_GRACE)

    async def _start(self) -> tuple[Server, PolicyInfo, App]:
        settings = self._settings
        server, info = await (self._start_process() if settings.process else self._start_here())
        try:
            if info.request_spec is not None:
                self._starting_app.reason = "the policy is warming up"
                client = server.async_client()
                try:
                    await client.submit(info.request_spec)
                except Exception as error:
                    raise LoadError(one_line(f"the policy fails on its request_spec: {describe(error)}")) from error
                finally:
                    client.close()
            metadata = settings.metadata if settings.metadata is not None else info.metadata
            app = create_app(
                server,
                name=settings.name,
                metadata=metadata,
                in_keys=info.in_keys,
                deadline=settings.deadline,
                newest_wins=settings.newest_wins,
                tokens=settings.tokens,
                hosts=settings.hosts,
                origins=settings.origins,
                limits=settings.limits,
                debug=settings.debug,
            )
            app.front.bytes_in_flight = self._guard.bytes_in_flight
            self._starting_app.serve(app)
        except BaseException:
            await server.aclose(0.0)
            raise
        return server, info, app

    async def _start_here(self) -> tuple[Server, PolicyInfo]:
        settings = self._settings
        # In a thread: it may take minutes, also where the module is imported.
        loading = asyncio.wrap_future(run_in_thread(partial(_load, settings), "aioinfer-load"))
        try:
            server, info = await asyncio.shield(loading)
        finally:
            self.is_loading = not loading.done()
        self._starting_app.reason = "the server starts"
        await server.__aenter__()
        return server, info

    async def _start_process(self) -> tuple[Server, PolicyInfo]:
        settings = self._settings
        context = get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        reading = asyncio.wrap_future(run_in_thread(partial(_receive, ours), "aioinfer-load"))
        with theirs:  # then `reading` is done, whatever has happened
            factory = PolicyFactory(settings.source, settings.in_keys, theirs)
            server = ProcessInferenceServer(factory, MPTransport(), ctx=context, **settings.server_options)
            await server.astart()
        return server, loads(await reading)

    def _tell(self, error: Exception) -> None:
        cause = error.__cause__ if isinstance(error, ServerStartError) and error.__cause__ is not None else error
        text = str(cause) if isinstance(cause, (LoadError, ServerStartError)) else describe(cause)
        if isinstance(cause, TypeError) and "InferenceServer(" in text:
            text = text.partition(": InferenceServer(")[0] + ": --in-keys observation --out-keys action"
        trace = error if self._settings.debug or self._settings.log_level == "debug" else None
        if trace is not None:
            _log.error("the policy could not be loaded", exc_info=trace)
        print(f"aioinfer serve: error: {one_line(text)}", file=sys.stderr, flush=True)

    async def _watch(self, server: Server, stopping: asyncio.Task[Any]) -> bool:
        """Wait until the service is to end; whether that is because the server has died."""
        while not stopping.done():
            if not server.is_alive:
                health = await server.ahealth()
                _log.error("the policy's server has ended: %s", health.reason)
                return True
            await asyncio.wait([stopping], timeout=_LOOK_EVERY)
        return False

    async def _drain(self, app: App, server: Server) -> None:
        seconds = self._settings.drain
        deadline = asyncio.get_running_loop().time() + seconds
        if not await app.drain(seconds):
            _log.warning("requests were not answered within %g seconds (--drain)", seconds)
        app.close()
        with suppress(InferenceError):
            await server.aclose(max(0.0, deadline - asyncio.get_running_loop().time()), drain=True)


def _load(settings: Settings) -> tuple[InferenceServer, PolicyInfo]:
    model = settings.source.load()
    info = PolicyInfo.of(model, settings.in_keys)
    server = InferenceServer(model, ThreadingTransport(), request_spec=info.request_spec, **settings.server_options)
    return server, info


def _receive(connection: Connection) -> bytes:
    """Read what the process says of its policy; nothing where it ends before."""
    with connection, suppress(EOFError):
        return connection.recv_bytes()
    return b""


def _max_connections(wanted: int) -> int:
    """How many connections there may be: each takes a descriptor, and running out of them stops everything else."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return max(1, wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - _SPARE_DESCRIPTORS))
