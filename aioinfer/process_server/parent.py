"""The parent's side of a server's process: the process, the connection to it, pauses, and weights on their way."""

from __future__ import annotations

import itertools
import logging
import math
import operator
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, NamedTuple, Self

from aioinfer.errors import (
    InferenceError,
    PeerDiedError,
    ServerClosedError,
    ServerNotRunningError,
    ServerStartError,
    WeightSyncError,
    clone_exception,
)
from aioinfer.futures import LockFreeFuture
from aioinfer.ipc.pickling import dumps, load_exception, loads
from aioinfer.ipc.queue import DescriptorQueue
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import NUMBER, FramedSocket, frame, header
from aioinfer.model_thread import PendingPolicy
from aioinfer.process_server.protocol import Command, Response
from aioinfer.weight_sync.snapshot import SnapshotBuffer, SnapshotPool, SnapshotRef
from aioinfer.weight_sync.weights import WeightsLike, check_version, extract_weights

__all__ = [
    "EXIT_GRACE",
    "ChildProcess",
    "ControlConnection",
    "PendingCommand",
    "ProcessPause",
    "WeightSender",
    "describe_exit",
    "inherited_fds",
]

EXIT_GRACE = 2.0
"""Seconds that a process has to exit after its server has shut down, before it is killed."""
# Seconds that a process which has closed its connection has to exit, so that the error can have its exit code.
_DISCONNECT_GRACE = 1.0

_log = logging.getLogger("aioinfer")


# -- the process -------------------------------------------------------------------------------------------

# By thread, the function that closes the descriptors which a process that this thread starts is to inherit.
_in_transit: dict[int, Callable[[], None]] = {}


@contextmanager
def inherited_fds(close: Callable[[], None]) -> Iterator[None]:
    """Start a process that inherits descriptors, then close them. A process that another thread forks closes them."""
    _in_transit[threading.get_ident()] = close
    try:
        yield
    finally:
        del _in_transit[threading.get_ident()]
        close()


def _close_fds_of_other_threads() -> None:
    for thread, close in _in_transit.items():
        if thread != threading.get_ident():
            close()
    _in_transit.clear()


os.register_at_fork(after_in_child=_close_fds_of_other_threads)


class ChildProcess:
    """Starts a process. One thread waits for its exit and reaps it; any thread may kill it.

    Args:
        context: starts it.
        target: the function that runs in it.
        arguments: of the function.
        name: of the process.
        daemon: as ``multiprocessing`` has it: a daemon can't have children of its own.

    Attributes:
        pid: of the process.
    """

    def __init__(
        self,
        context: BaseContext,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        *,
        name: str = "aioinfer-server",
        daemon: bool = True,
    ) -> None:
        method = context.get_start_method()
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=target, args=arguments, name=_Name(name), daemon=daemon
        )
        _check_descriptors()
        with _sigint_blocked(method):
            self._process.start()
        self.pid: int = self._process.pid
        # Unlike the sentinel, a pidfd can't be held open by processes that the process has forked.
        self._pidfd: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # of an old kernel, or in a sandbox
                self._pidfd = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """A descriptor that is readable when the process has exited."""
        return int(self._process.sentinel) if self._pidfd is None else self._pidfd

    def kill(self) -> None:
        """Kill the process, if it runs."""
        pidfd = self._pidfd
        if pidfd is not None:  # a fork server may have reaped it, and its number may be another process's by now
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return
            except OSError:  # in a sandbox
                pass
            else:
                return
        with suppress(OSError, ValueError):  # it has just exited
            self._process.kill()

    def reap(self, timeout: float | None = None) -> int | None:
        """Return the exit code of a process that has exited; once.

        Args:
            timeout: seconds to wait for a fork server that is to tell it.

        Returns:
            The code; ``None`` if other code has reaped the process, or the fork server says nothing.
        """
        self._process.join(timeout)
        code: int | None = self._process.exitcode
        with suppress(ValueError):
            self._process.close()
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            with suppress(OSError):  # the program may have closed all of its descriptors; the exit code counts
                os.close(pidfd)
        return code


def _check_descriptors() -> None:
    """Raise :class:`OSError` if few descriptors are free: a start that runs out of them leaks those it has made."""
    with ExitStack() as opened:
        for _ in range(3):
            for descriptor in os.pipe():
                opened.callback(os.close, descriptor)


@contextmanager
def _sigint_blocked(method: str) -> Iterator[None]:
    """Start a process in which SIGINT is blocked until the process ignores it; but see :class:`_Name`."""
    if method != "fork":
        resource_tracker.ensure_running()  # its start unblocks SIGINT
    if method == "forkserver":
        forkserver.ensure_running()  # unblocked, since all processes that it forks begin as it did
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Name(str):
    """The name of a process, which ignores SIGINT as soon as it unpickles this: before it imports anything.

    A process that a fork server forks does not inherit that SIGINT is blocked in the thread that starts it.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return operator.getitem, ((str(self), _IgnoresSigint()), 0)


class _IgnoresSigint:
    def __reduce__(self) -> Any:
        return signal.signal, (signal.SIGINT, signal.SIG_IGN)


class PendingCommand(LockFreeFuture[Any]):
    """A command that waits for its response.

    Args:
        number: of the command.

    Attributes:
        number: as given.
        on_done: called on the connection's thread after the command is done.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.on_done: Callable[[PendingCommand], None] | None = None


class ControlConnection:
    """Starts a server's process, sends it commands, and reaps it, all on one thread of its own.

    Signal handlers run on the main thread only. So an exception of a handler never interrupts the thread that
    launches, sends and receives. The public methods take no lock, so a handler may call them, whatever it interrupts.

    Any thread may call the public methods. The connection's thread owns the private ones, and calls ``launch``,
    ``decline`` and ``release``.

    Args:
        launch: starts the process; returns the connection to it, and its handle.
        decline: tells callers that the server will not start.
        release: called when the process has exited, or was never launched.

    Attributes:
        pid: of the process; ``None`` before its start.
        ready: done when the process serves, or with the reason why it does not.
        exited: done with the exit code; ``None`` if it is not known.
        close_error: why no command is accepted any more.
        started: whether the thread has run. Until then, a thread that requests a shutdown also ends the connection.
    """

    def __init__(
        self,
        launch: Callable[[], tuple[FramedSocket, ChildProcess]],
        decline: Callable[[ServerClosedError], None],
        release: Callable[[], None],
    ) -> None:
        self.pid: int | None = None
        self.ready: LockFreeFuture[None] = LockFreeFuture()
        self.exited: LockFreeFuture[int | None] = LockFreeFuture()
        self.close_error: InferenceError | None = None
        self.started = False
        self._launch = launch
        self._decline = decline
        self._release = release
        self._owner = os.getpid()
        self._numbers = itertools.count()
        self._jobs: deque[Callable[[], None]] = deque()  # for the thread
        self._selector: Selector | None = None  # wakes the thread; closed with the last reference to it
        self._finished = False
        # The thread's own:
        self._sock: FramedSocket
        self._process: ChildProcess
        self._pending: dict[int, PendingCommand] = {}
        self._kill_at = math.inf
        self._disconnected = self._has_exited = self._awaits_writable = False

    # -- start and end ---------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made the server, and not a forked child of it."""
        return self._owner == os.getpid()

    @property
    def has_pending(self) -> bool:
        """Whether a command waits for its response."""
        return bool(self._pending)

    def check_process(self) -> None:
        """Raise :class:`ServerNotRunningError` in a forked child of the process that made the server."""
        if not self.is_here:
            raise ServerNotRunningError(
                f"process {self._owner} has made the server, this is process {os.getpid()}; hand clients over"
            )

    def start(self) -> None:
        """Start the thread, once; ``ready`` has the outcome.

        The new thread says that it runs by a condition. Where a signal handler raises as the condition takes its lock
        again, the standard library releases a lock that it has not got, and hides what the handler has raised.
        """
        try:
            threading.Thread(target=self._run, name="aioinfer-host", daemon=True).start()
        except RuntimeError as error:
            if error.__context__ is None or str(error) != "release unlocked lock":
                raise
            raise error.__context__ from None

    def request_shutdown(self, timeout: float | None, *, drain: bool) -> None:
        """Accept no more commands, and have the process shut down; kill it if it does not serve yet.

        A process that has not exited two seconds past ``timeout`` is killed. ``exited`` has the outcome; if the thread
        has not run yet, the caller must call :meth:`close_unstarted` too.
        """
        self.close_error = self.close_error or ServerClosedError("the server is shut down")
        self.call_soon(partial(self._shut_down, timeout, drain))

    def close_unstarted(self) -> None:
        """End a connection that has launched no process, after its shutdown was requested. May block for 2 s."""
        assert isinstance(self.close_error, ServerClosedError)
        self._finished = True
        try:
            self._decline(self.close_error)
        finally:
            self._release()
            self.exited.set_result(None)
            self.ready.set_exception(clone_exception(self.close_error))

    # -- commands --------------------------------------------------------------------------------------

    @property
    def has_served(self) -> bool:
        """Whether the process has begun to serve; it may have exited since."""
        return self.ready.done and self.ready.error is None

    def check(self) -> None:
        """Raise the reason why the server accepts no commands, if it accepts none.

        Raises:
            ServerNotRunningError: the server does not run, or this process was forked from the one that made it.
            PeerDiedError: its process is gone.
        """
        self.check_process()
        if not self.has_served or isinstance(self.close_error, ServerClosedError):
            reason = self.close_error or ("it starts" if self.started else "it was not started")
            raise ServerNotRunningError(f"the server does not run: {reason}")
        if self.close_error is not None:
            raise clone_exception(self.close_error)

    def new_command(self) -> PendingCommand:
        """Number a command before it is submitted."""
        return PendingCommand(next(self._numbers))

    def submit(self, command: Command, *arguments: Any, pending: PendingCommand | None = None) -> PendingCommand:
        """Send a command to the process; ``pending``, or a new command, gets its result and is returned.

        Raises:
            ServerNotRunningError: this process was forked from the one that made the server.
        """
        self.check_process()
        pending = self.new_command() if pending is None else pending
        self.call_soon(partial(self.send, pending, command, dumps(arguments)))
        return pending

    def call_soon(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the thread, in FIFO order.

        If the thread has finished, :attr:`close_error` is set, and ``job`` runs in the calling thread, and possibly in
        both; it may only fail futures then.
        """
        self._jobs.append(job)
        selector = self._selector
        if selector is not None:
            selector.notify()
        if self._finished:  # the thread may have run the job, or not
            job()

    def send(self, pending: PendingCommand, command: Command, payload: bytes) -> None:
        """Send a command (a job of the thread)."""
        ends_pause = command is Command.RESUME and self.has_served and not self._finished  # a drain waits for that
        if self.close_error is not None and not ends_pause:
            self._complete(pending, clone_exception(self.close_error))
            return
        self._pending[pending.number] = pending
        self._sock.send(frame(header(command, pending.number), payload))

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.started = True
        if self.close_error is not None:
            self.close_unstarted()
            return
        try:
            self._selector = Selector()
            self._sock, self._process = self._launch()
        except BaseException as error:  # a factory that does not pickle may raise anything
            self._fail_to_launch(error)
            return
        self.pid = self._process.pid
        try:
            self._communicate()
        except BaseException:
            _log.exception("the connection to the server's process %d failed; it is killed", self.pid)
            self._set_died("was killed, because the connection to it failed")
            self._process.kill()
        finally:
            self._finish()

    def _fail_to_launch(self, error: BaseException) -> None:
        text = f"{type(error).__qualname__}: {clone_exception(error)}"
        self.close_error = self.close_error or ServerClosedError(f"the server could not be started: {text}")
        start_error = ServerStartError(f"the server's process could not be started: {text}")
        start_error.__cause__ = error
        self._selector = None
        self.ready.set_exception(start_error)
        self.close_unstarted()
        self._run_jobs()

    def _communicate(self) -> None:
        selector = self._selector
        assert selector is not None
        selector.register(self._sock, self._receive)
        selector.register(self._process, self._set_exited)
        while not self._has_exited:
            self._run_jobs()
            if self._sock.unsent != self._awaits_writable and not self._disconnected:
                self._awaits_writable = self._sock.unsent
                selector.register(self._sock, self._receive, writable=self._awaits_writable)
            left = self._kill_at - time.monotonic()
            selector.wait(None if left == math.inf else max(0.0, left))
            if time.monotonic() >= self._kill_at:
                self._kill_at = math.inf
                selector.wait(0.0)  # it may have exited while this thread did not run
                if self._has_exited:
                    break
                if self._disconnected:
                    self._set_died("has closed its connection, and was killed")
                self._process.kill()
        while not self._disconnected and self._sock.readable():  # the last responses
            self._receive()

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _set_exited(self) -> None:
        self._has_exited = True

    def _shut_down(self, timeout: float | None, drain: bool) -> None:
        if self._finished:
            return
        if not self.has_served:
            self._process.kill()
            return
        self._sock.send(frame(header(Command.SHUTDOWN), dumps((timeout, drain))))
        if timeout is not None:
            self._kill_at = min(self._kill_at, time.monotonic() + timeout + EXIT_GRACE)

    def _receive(self) -> None:
        try:
            if self._sock.unsent:
                self._sock.flush()
            _, frames = self._sock.receive()
        except EOFError:
            self._disconnected = True
            self._kill_at = min(self._kill_at, time.monotonic() + _DISCONNECT_GRACE)
            if self._selector is not None:
                self._selector.unregister(self._sock)
            return
        for head, payload in frames:
            self._handle(Response(head >> 60), head & NUMBER, payload or b"")

    def _handle(self, kind: Response, number: int, payload: bytes) -> None:
        if kind is Response.READY:
            self.ready.set_result(None)
        elif kind is Response.FAILED:
            self.ready.set_exception(_start_error(payload))
        elif (pending := self._pending.pop(number, None)) is not None:  # a pause may get a second response
            try:
                result = load_exception(payload) if kind is Response.ERROR else loads(payload)
            except BaseException as error:  # a class of the user's may raise anything
                result, kind = clone_exception(error), Response.ERROR
            self._complete(pending, result if kind is Response.ERROR else None, result)

    def _complete(self, pending: PendingCommand, error: BaseException | None, result: Any = None) -> None:
        if error is None:
            pending.set_result(result)
        else:
            pending.set_exception(error)
        if pending.on_done is not None:
            pending.on_done(pending)

    def _set_died(self, reason: str) -> None:
        self.close_error = self.close_error or PeerDiedError(f"the server's process {reason}")

    def _finish(self) -> None:
        code = None
        try:
            code = self._process.reap()
        except Exception:  # callers must be told in any case
            _log.exception("the exit code of the server's process %d is lost", self.pid)
        self._set_died(f"is gone: {describe_exit(code)}")
        error = self.close_error
        assert error is not None
        self._sock.close()
        self._release()
        self._selector = None
        self._finished = True
        self.exited.set_result(code)  # before the commands fail: their callers may look at it
        closed = isinstance(error, ServerClosedError)
        self.ready.set_exception(
            clone_exception(error) if closed else ServerStartError(f"{error}; it has not served yet")
        )
        while self._pending:
            _, pending = self._pending.popitem()
            self._complete(pending, clone_exception(error))
        self._run_jobs()


def _start_error(payload: bytes) -> ServerStartError:
    text, original = loads(payload)
    error = ServerStartError(f"the server's process could not start:\n\n{text}")
    if original is not None:
        with suppress(BaseException):  # its class may be unknown in this process, or not unpickle
            error.__cause__ = load_exception(original)
    return error


def describe_exit(code: int | None) -> str:
    """How a process has ended, in words."""
    if code is None:
        return "its exit code is unknown"
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


class _Update(NamedTuple):
    ref: SnapshotRef
    buffer: SnapshotBuffer
    cast: bool
    done: LockFreeFuture[None]


class WeightSender:
    """Sends snapshots in shared memory to the process, in FIFO order; each waits until the one before is in use.

    Any thread may call ``send``, which takes no lock. The connection's thread owns the private methods.

    Args:
        connection: to the process.
        queue: for the snapshots; the process reads it.
    """

    def __init__(self, connection: ControlConnection, queue: DescriptorQueue) -> None:
        self._connection = connection
        self.queue = queue
        # `send` takes a pool out, or makes one, and puts it back. One in which a signal handler has interrupted it may
        # have a half-written buffer, and is dropped.
        self.pools: deque[SnapshotPool] = deque()
        self._waiting: deque[_Update] = deque()
        self._in_flight = False  # one update at most: the queue is short

    def send(self, weights: WeightsLike, version: int | None, *, cast: bool) -> LockFreeFuture[None]:
        """Copy weights as they are now; the future is done when they are in use.

        Raises:
            TypeError: ``weights`` has none, or ``version`` is no integer.
            ValueError: ``version`` does not fit into 64 bits.
        """
        check_version(version)
        found = extract_weights(weights, "tensordict")
        try:
            pool = self.pools.pop()
        except IndexError:
            pool = SnapshotPool()
        ref, buffer = pool.take(found, version)
        buffer.refcount += 1
        update = _Update(ref, buffer, cast, LockFreeFuture())
        self._connection.call_soon(partial(self._accept, update))
        self.pools.append(pool)
        return update.done

    def _accept(self, update: _Update) -> None:
        if self._connection.close_error is not None:
            update.done.set_exception(clone_exception(self._connection.close_error))
        else:
            self._waiting.append(update)
            self._send_next()

    def _send_next(self) -> None:
        while self._waiting and not self._in_flight:
            update = self._waiting.popleft()
            if self._connection.close_error is not None:
                self._finish(update, clone_exception(self._connection.close_error))
                continue
            try:
                self.queue.put(update.ref)
            except Exception as error:
                text = f"{type(error).__qualname__}: {error}"
                self._finish(update, WeightSyncError(f"the weights could not be sent: {text}"))
                continue
            self._in_flight = True
            pending = self._connection.new_command()
            pending.on_done = partial(self._on_response, update)
            self._connection.send(pending, Command.UPDATE, dumps((update.cast,)))

    def _on_response(self, update: _Update, pending: PendingCommand) -> None:
        self._in_flight = False
        self._finish(update, pending.error)
        self._send_next()

    def _finish(self, update: _Update, error: BaseException | None) -> None:
        update.buffer.refcount -= 1
        if error is None:
            update.done.set_result(None)
        else:
            update.done.set_exception(error)


class ProcessPause:
    """The context manager of ``ProcessInferenceServer.paused``, for ``with`` and ``async with``.

    A pause has the number of its command. ``RESUME`` with that number ends it, also before it has begun. Whatever
    interrupts a block, ``__exit__`` included, the pause ends when this object is garbage collected at the latest.

    One thread at a time owns it.

    Args:
        connection: to the process.
        policy: for pending requests.
    """

    def __init__(self, connection: ControlConnection, policy: PendingPolicy) -> None:
        self._connection = connection
        self._policy = policy
        self._numbers: list[int] = []  # of the commands that have begun a pause, or may have

    def __enter__(self) -> Self:
        try:
            self._begin().result()
            return self
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        resumed = self._end()
        if resumed is not None:
            resumed.wait()

    async def __aenter__(self) -> Self:
        try:
            await self._begin().async_result()
            return self
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        resumed = self._end()
        if resumed is not None:
            await resumed.async_wait()

    def __del__(self) -> None:
        while hasattr(self, "_numbers") and self._numbers:
            self._end()

    def _begin(self) -> PendingCommand:
        pending = self._connection.new_command()
        self._numbers.append(pending.number)  # first: from now on the pause will be ended
        return self._connection.submit(Command.PAUSE, self._policy, pending=pending)

    def _end(self) -> PendingCommand | None:
        """End the latest pause; the response comes when requests are accepted again, or the process is gone."""
        resumed = None
        if self._numbers:
            with suppress(ServerNotRunningError):  # in a forked child, which has nothing to end
                resumed = self._connection.submit(Command.RESUME, self._numbers[-1])
            del self._numbers[-1]  # last: if a signal handler raises before, it is ended again
        return resumed
