"""A server in a process of its own, as the process that starts it sees it."""

from __future__ import annotations

import atexit
import inspect
import logging
import multiprocessing
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.context import BaseContext
from typing import Any, Self

import anyio
from tensordict import TensorDictBase
from torch import nn

from aioinfer.devices import Model
from aioinfer.errors import InferenceError, PeerDiedError, ServerClosedError
from aioinfer.futures import LockFreeFuture
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.sockets import FramedSocket
from aioinfer.model_thread import PendingPolicy, check_policy
from aioinfer.process_server.child import run
from aioinfer.process_server.parent import (
    EXIT_GRACE,
    ChildProcess,
    ControlConnection,
    PendingCommand,
    ProcessPause,
    WeightSender,
    inherited_fds,
)
from aioinfer.process_server.protocol import Command, ServerConfig, SharedVersion
from aioinfer.server import BaseServer, InferenceServer, find_example
from aioinfer.stats import Health, ServerStats
from aioinfer.transports.ipc.server import ProcessTransport, TransportHandoff
from aioinfer.transports.local import ThreadingTransport
from aioinfer.weight_sync.weights import WeightsLike

__all__ = ["EXIT_TIMEOUT", "ProcessInferenceServer"]

EXIT_TIMEOUT = EXIT_GRACE + 1.0
"""Seconds to wait for the exit of a process past a shutdown's timeout: until it is killed, and then for the kill."""

# Options for which the layout of requests must be known, unless they are as they are by default.
_NEED_LAYOUT = {"compile": False, "bucket_sizes": None, "cuda_graphs": False}

_log = logging.getLogger("aioinfer")


class ProcessInferenceServer(BaseServer):
    """An :class:`InferenceServer` in a process of its own: it shares neither the GIL nor an event loop with you.

    ``with server:`` or ``start()`` / ``shutdown()`` run it from code that has no event loop, ``async with server:``
    or ``astart()`` / ``aclose()`` from a coroutine. Requests that are submitted before it starts wait for it.

    A server starts once: its transport goes with its process. The process ends within two seconds of its parent,
    however that ends, unless the model holds the GIL for ever. It ignores Ctrl-C, which goes to all processes of a
    terminal: the parent decides.

    Any thread may call the public methods, and so may a signal handler.

    Args:
        policy_factory: makes the model, in the process. It is pickled, unless the process is forked; tensors that
            it holds are copied.
        transport: an :class:`MPTransport` or a :class:`ProcessSlotTransport`, made here, or several in a list. From the
            start on, the process serves them; clients are made here all the same, by default of the first one.
        ctx: a multiprocessing context, or the name of a start method; ``None`` spawns. Fork only where no other thread
            of yours can hold a lock that the process would need, and before CUDA is used.
        startup_timeout: seconds that the process has to serve; ``None`` waits for ever. If it dies before,
            that is known at once in either case.
        options: the keyword arguments of :class:`InferenceServer`. Those that need no model are checked here.

    Attributes:
        transports: all of them.

    Raises:
        TypeError: an argument of the wrong type, or one that :class:`InferenceServer` does not have; a transport for
            callers of one process; or a model instead of a function that makes it.
        ValueError: an unknown start method; ``startup_timeout`` is not above 0; no transport, or one twice; or
            :class:`InferenceServer` raises it.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Model],
        transport: ProcessTransport | Sequence[ProcessTransport],
        *,
        ctx: BaseContext | str | None = None,
        startup_timeout: float | None = None,
        **options: Any,
    ) -> None:
        if isinstance(policy_factory, nn.Module):
            raise TypeError(
                f"policy_factory must be a function that makes the model in the server's process, got a model, a "
                f"{type(policy_factory).__qualname__}; give a function that returns it, such as `lambda: model`, "
                "which must be defined at the top of a module unless the process is forked"
            )
        if not callable(policy_factory):
            raise TypeError(f"policy_factory must be callable, got {type(policy_factory).__qualname__}")
        transports = list(transport) if isinstance(transport, Sequence) else [transport]
        for one in transports:
            if not isinstance(one, ProcessTransport):
                raise TypeError(
                    "transport must be an MPTransport or a ProcessSlotTransport, whose callers may be in other "
                    f"processes than the server, or a list of them; got {type(one).__qualname__}"
                )
        if not transports or len(set(transports)) < len(transports):
            raise ValueError("expected at least one transport, and none twice")
        if not isinstance(ctx, BaseContext | str | None):
            raise TypeError(f"ctx must be a multiprocessing context or its name, got {type(ctx).__qualname__}")
        if not isinstance(startup_timeout, int | float | None) or isinstance(startup_timeout, bool):
            raise TypeError(f"startup_timeout must be a number of seconds, or None, got {startup_timeout!r}")
        if startup_timeout is not None and not startup_timeout > 0:
            raise ValueError(f"startup_timeout must be above 0, or None, got {startup_timeout}")
        arguments = _check_options(options, transports)
        self.max_batch_size: int = arguments["max_batch_size"]
        self.transports: list[ProcessTransport] = transports
        self.startup_timeout = startup_timeout
        self._factory = policy_factory
        self._options = options
        self._context = ctx if isinstance(ctx, BaseContext) else multiprocessing.get_context(ctx or "spawn")
        self._starters: deque[object] = deque()  # the first one has started the server
        # The connection's thread calls these three methods, and only they write the attributes below.
        self._connection = ControlConnection(self._launch, self._decline, self._release)
        self._weight_sender: WeightSender | None = None
        self._shared_version: SharedVersion | None = None
        self._version: int = arguments["policy_version"]  # while there is no shared one

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
            self._check_start(self._connection.ready.wait(self.startup_timeout))
        except BaseException:
            if self._is_started_by(starter):
                self._terminate()
                self._connection.exited.wait(EXIT_TIMEOUT)
            raise
        return self

    async def astart(self) -> Self:
        """Do as :meth:`start`, without blocking the event loop. If it is cancelled, the process is killed."""
        starter = object()
        try:
            self._begin(starter)
            self._check_start(await self._connection.ready.async_wait(self.startup_timeout))
        except BaseException:
            if self._is_started_by(starter):
                self._terminate()
                with anyio.CancelScope(shield=True):
                    await self._connection.exited.async_wait(EXIT_TIMEOUT)
            raise
        return self

    def _begin(self, starter: object) -> None:
        self._connection.check_process()
        if not self._starters:
            self._check_unused()
        self._starters.append(starter)
        if not self._is_started_by(starter):
            raise RuntimeError(
                "the server was started before, and its transport went with its process; "
                "make another server, with another transport"
            )
        atexit.register(self.shutdown, 1.0)
        self._connection.start()

    def _check_unused(self) -> None:
        try:
            for transport in self.transports:
                transport.check_unused()
        finally:  # a shutdown uses them, also that of a signal handler that has just interrupted this
            if self._connection.close_error is not None:
                raise ServerClosedError("the server was shut down before it started; make another server") from None

    async def _astart(self) -> Self:
        return await self.astart()

    def _is_started_by(self, starter: object) -> bool:
        return bool(self._starters) and self._starters[0] is starter

    def _check_start(self, in_time: bool) -> None:
        if not in_time:
            raise TimeoutError(f"the server does not serve within {self.startup_timeout:g} seconds")
        self._connection.ready.result()

    def _terminate(self) -> None:
        self._connection.request_shutdown(0.0, drain=False)
        if not self._connection.started:
            self._connection.close_unstarted()

    # -- end -------------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:
        """Shut the server down as :meth:`InferenceServer.shutdown` does, and end its process. Idempotent.

        A process that has not exited two seconds past ``timeout`` is killed; one that has not begun to serve, at once.
        A server that was not started can't start any more: requests that wait for it fail with
        :class:`ServerClosedError`. In a forked child of the process that made the server nothing happens.

        A signal handler may call it, whatever it interrupts.

        Args:
            timeout: seconds to wait for the model thread; ``None`` waits for ever.
            drain: serve the pending requests first, as far as ``timeout`` allows; by default they fail with
                :class:`ServerClosedError` at once.
        """
        if not self._connection.is_here:
            return
        self._connection.request_shutdown(timeout, drain=drain)
        if not self._connection.started:
            self._connection.close_unstarted()
        self._connection.exited.wait(None if timeout is None else timeout + EXIT_TIMEOUT)

    async def aclose(self, timeout: float | None = 5.0, *, drain: bool = False) -> None:  # noqa: ASYNC109 - as shutdown
        """Shut down without blocking the event loop; see :meth:`shutdown`.

        If it is cancelled, the server shuts down all the same and no call waits for it.
        """
        if not self._connection.is_here:
            return
        self._connection.request_shutdown(timeout, drain=drain)
        if not self._connection.started and not self._connection.exited.done:
            threading.Thread(target=self._connection.close_unstarted, name="aioinfer-end", daemon=True).start()
        await self._connection.exited.async_wait(None if timeout is None else timeout + EXIT_TIMEOUT)

    # -- on the connection's thread --------------------------------------------------------------------

    def _launch(self) -> tuple[FramedSocket, ChildProcess]:
        inherited = ExitStack()  # of the process; closed here, whether it starts or not
        with inherited_fds(inherited.close), ExitStack() as ours:
            parent, child = socket.socketpair()
            inherited.callback(child.close)
            sock = FramedSocket(parent)
            ours.callback(sock.close)
            queue = DescriptorQueue()
            ours.callback(queue.close)
            version = SharedVersion(self._version)
            given: list[TransportHandoff] = []
            for transport in self.transports:
                given.append(transport.hand_off())
                inherited.callback(given[-1].close)
            config = ServerConfig(
                policy_factory=self._factory, options=self._options, transports=given, updates=queue, version=version
            )
            process = ChildProcess(self._context, run, (child, config))
            ours.pop_all()
        self._shared_version = version
        self._weight_sender = WeightSender(self._connection, queue)
        return sock, process

    def _decline(self, error: ServerClosedError) -> None:
        """Fail pending and later requests of the transports that were not given to the process."""
        for transport in self.transports:
            if transport.is_served:
                continue
            try:
                transport.close_unserved(error)
            except Exception:
                _log.exception("callers at %s may not have heard that their server does not start", transport.address)

    def _release(self) -> None:
        """Free the resources of a running process."""
        atexit.unregister(self.shutdown)
        if self._shared_version is not None:
            self._version, self._shared_version = self._shared_version.read(), None
        if self._weight_sender is not None:
            self._weight_sender.queue.close()
            self._weight_sender = None  # and the memory of the weights

    # -- clients ---------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The address of the first transport, for :func:`connect` in processes that were handed no client."""
        return self.transports[0].address

    # -- state -----------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; :meth:`health` says whether it serves. ``False`` in a forked child."""
        connection = self._connection
        return connection.is_here and connection.pid is not None and not connection.exited.done

    @property
    def pid(self) -> int | None:
        """Of the process, also when it has exited; ``None`` before the start."""
        return self._connection.pid

    def stats(self, *, reset: bool = False) -> ServerStats:
        """What the server did since it started; ``reset=True`` starts anew afterwards. Waits for the process.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ServerClosedError: it was shut down meanwhile.
            PeerDiedError: its process is gone.
        """
        return self._request(Command.STATS, bool(reset)).result()  # type: ignore[no-any-return]

    async def astats(self, *, reset: bool = False) -> ServerStats:
        """Do as :meth:`stats`, without blocking the event loop."""
        return await self._request(Command.STATS, bool(reset)).async_result()  # type: ignore[no-any-return]

    def health(self, timeout: float = 1.0) -> Health:
        """How the server is. It always answers, whatever became of the process.

        Args:
            timeout: seconds that the process has to answer; one that does not is alive and not ready.

        Raises:
            ServerNotRunningError: this process was forked from the one that made the server.
        """
        pending = self._request_health()
        if pending is not None:
            pending.wait(timeout)
        return self._read_health(pending, timeout)

    async def ahealth(self, timeout: float = 1.0) -> Health:  # noqa: ASYNC109 - as health
        """Do as :meth:`health`, without blocking the event loop."""
        pending = self._request_health()
        if pending is not None:
            await pending.async_wait(timeout)
        return self._read_health(pending, timeout)

    def _running(self) -> tuple[ControlConnection, WeightSender]:
        """The connection and the sender of a running server; raise why there are none."""
        connection, weight_sender = self._connection, self._weight_sender
        connection.check()
        if weight_sender is None:
            raise PeerDiedError("the server's process is gone")
        return connection, weight_sender

    def _request(self, command: Command, *arguments: Any) -> PendingCommand:
        return self._running()[0].submit(command, *arguments)

    def _request_health(self) -> PendingCommand | None:
        self._connection.check_process()
        try:
            return self._request(Command.HEALTH)
        except InferenceError:
            return None

    def _read_health(self, pending: PendingCommand | None, timeout: float) -> Health:
        if pending is not None and pending.done and pending.error is None:
            return pending.result()  # type: ignore[no-any-return]
        connection = self._connection
        reason = "" if connection.close_error is None else str(connection.close_error)
        if connection.exited.done:
            code = connection.exited.result()
            return Health(alive=False, ready=False, pid=connection.pid, exit_code=code, reason=reason)
        if not connection.started:
            return Health(alive=False, ready=False, reason=reason or "the server was not started")
        silent = f"its process does not answer within {timeout:g} seconds"
        reason = reason or (silent if connection.has_served else "the server starts")
        return Health(alive=True, ready=False, pid=connection.pid, reason=reason)

    # -- weights ---------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The version of the weights in use, or in use when the process exited. Never raises, and never waits."""
        shared = self._shared_version
        return self._version if shared is None else shared.read()

    def update_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Serve other weights, from the next forward pass on; return when they are in use.

        They travel in shared memory, one update after the other.

        Args:
            weights: a module, a TensorDict or a state dict. They are copied, as they are now.
            version: your own number for them; ``None`` counts up.
            cast: convert weights of another dtype than the model's, instead of refusing them.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ValueError: ``version`` does not fit into 64 bits.
            TypeError: the model, or ``weights``, has no weights; or ``version`` is no integer.
            WeightSyncError: the weights don't fit, or did not arrive; the old ones stay in use.
            ServerClosedError: the server was shut down meanwhile.
            PeerDiedError: its process is gone.
        """
        self._send_weights(weights, version, cast).result()

    async def aupdate_weights(self, weights: WeightsLike, *, version: int | None = None, cast: bool = False) -> None:
        """Do as :meth:`update_weights`, without blocking the event loop while a forward pass runs.

        The copy is taken before it first suspends. If it is cancelled, the weights are used all the same.
        """
        await self._send_weights(weights, version, cast).async_result()

    def _send_weights(self, weights: WeightsLike, version: int | None, cast: bool) -> LockFreeFuture[None]:
        return self._running()[1].send(weights, version, cast=bool(cast))

    # -- pauses ----------------------------------------------------------------------------------------

    def paused(self, pending: PendingPolicy = "keep") -> ProcessPause:
        """Run no forward pass inside a ``with`` block, or an ``async with`` block. Weights may be updated inside.

        At the end of the block, the call waits until the server runs again; it also ends if the process dies.

        Args:
            pending: the policy for requests that are pending when the block begins: ``"keep"`` lets them wait,
                ``"wait"`` serves them first, ``"reject"`` fails them, and those that are submitted inside, with
                :class:`ServerPausedError`. With the other two, requests that are submitted inside wait.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            ServerClosedError: where the block is entered, it was shut down meanwhile.
            PeerDiedError: its process is gone.
            ValueError: ``pending`` is none of the three.
        """
        check_policy(pending)
        return ProcessPause(self._running()[0], pending)


class _AnyModel(nn.Module):
    """Stands for the model, which the process makes later."""

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError


def _check_options(options: dict[str, Any], transports: Sequence[ProcessTransport]) -> dict[str, Any]:
    """Check the arguments of the server with one that is never started; return them with their defaults."""
    model, transport = _AnyModel(), ThreadingTransport()
    checked = dict(options)
    if any(options.get(name, default) is not default for name, default in _NEED_LAYOUT.items()):
        checked["request_spec"] = find_example(transports, options.get("request_spec"))
    InferenceServer(model, transport, **checked)
    bound = inspect.signature(InferenceServer).bind(model, transport, **options)
    bound.apply_defaults()
    return bound.arguments
