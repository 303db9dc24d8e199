"""The parent's connection to a process that serves: commands, their answers, and the news of its end."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from aioinfer.errors import (
    InferenceError,
    PeerDiedError,
    ServerClosedError,
    ServerNotRunningError,
    ServerStartError,
    clone_exception,
)
from aioinfer.hosting.completion import Completion
from aioinfer.hosting.orders import FromChild, FromParent
from aioinfer.hosting.process import ChildProcess
from aioinfer.ipc.pickling import dumps, load_exception, loads
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import NUMBER, FramedSocket, frame, header

__all__ = ["PARTING", "Call", "Hotline"]

PARTING = 2.0
"""Seconds that a process has to end after its server did, before it is killed."""
# Seconds that a process which has closed its connection has to end, so that the error can say how it did.
_HUNG_UP = 1.0

_log = logging.getLogger("aioinfer")


class Call(Completion[Any]):
    """A command whose answer is awaited.

    Args:
        number: of the command.
        then: called on the hotline's thread when it is settled.
    """

    def __init__(self, number: int, then: Callable[[Call], None] | None = None) -> None:
        super().__init__()
        self.number = number
        self.then = then


class Hotline:
    """Starts a process that serves, gives it commands, and reaps it, all on one thread of its own.

    Signal handlers run on the main thread only. So whatever they raise, they never interrupt the thread that launches,
    sends and receives; and since the public methods take no lock, a handler may call them whatever it interrupts.

    Any thread: the public methods. The thread: the private ones.

    Args:
        launch: starts the process; returns the connection to it, and its handle.
        decline: tells callers that the server will not start.
        release: called when the process has ended, or was never launched.

    Attributes:
        pid: of the process; ``None`` before its start.
        ready: settled when the process serves, or with why it does not.
        ended: settled with the exit code; ``None`` if it is not known.
        refusal: why no command is taken any more.
        began: whether the thread has run. Until then, whoever closes the hotline ends it.
    """

    def __init__(
        self,
        launch: Callable[[], tuple[FramedSocket, ChildProcess]],
        decline: Callable[[ServerClosedError], None],
        release: Callable[[], None],
    ) -> None:
        self.pid: int | None = None
        self.ready: Completion[None] = Completion()
        self.ended: Completion[int | None] = Completion()
        self.refusal: InferenceError | None = None
        self.began = False
        self._launch = launch
        self._decline = decline
        self._release = release
        self._owner = os.getpid()
        self._numbers = itertools.count()
        self._jobs: deque[Callable[[], None]] = deque()  # for the thread
        self._poller: Selector | None = None  # wakes the thread; its descriptors go with the last thread that uses it
        self._over = False
        # The thread's:
        self._wire: FramedSocket
        self._process: ChildProcess
        self._calls: dict[int, Call] = {}
        self._kill_at = math.inf
        self._hung_up = self._exited = self._watches_room = False

    # -- start and end ---------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made the server, and no forked child of it."""
        return self._owner == os.getpid()

    def check_process(self) -> None:
        """Raise :class:`ServerNotRunningError` in a forked child of the process that made the server."""
        if not self.is_here:
            raise ServerNotRunningError(
                f"process {self._owner} has made the server, this is process {os.getpid()}; hand clients over"
            )

    def start(self) -> None:
        """Start the thread, once; ``ready`` tells the rest."""
        threading.Thread(target=self._run, name="aioinfer-host", daemon=True).start()

    def close(self, timeout: float | None, *, drain: bool) -> None:
        """Take no more commands, and have the process shut down; one that has not begun to serve is killed.

        A process that has not ended two seconds past ``timeout`` is killed. ``ended`` tells the rest, once
        :meth:`end_unlaunched` was called where the thread has not run yet.
        """
        self.refusal = self.refusal or ServerClosedError("the server is shut down")
        self.call_soon(partial(self._shut_down, timeout, drain))

    def end_unlaunched(self) -> None:
        """End what has not launched anything, and will not since it was closed. May block for two seconds."""
        assert isinstance(self.refusal, ServerClosedError)
        self._over = True
        try:
            self._decline(self.refusal)
        finally:
            self._release()
            self.ended.succeed(None)
            self.ready.fail(clone_exception(self.refusal))

    # -- commands --------------------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Whether the process has begun to serve, though it may have ended since."""
        return self.ready.done and self.ready.error is None

    def check(self) -> None:
        """Raise why the server takes no command.

        Raises:
            ServerNotRunningError: it does not run, or this process was forked from the one that made it.
            PeerDiedError: its process is gone.
        """
        self.check_process()
        if not self.serves or isinstance(self.refusal, ServerClosedError):
            why = self.refusal or ("it starts" if self.began else "it was not started")
            raise ServerNotRunningError(f"the server does not run: {why}")
        if self.refusal is not None:
            raise clone_exception(self.refusal)

    def new_call(self) -> Call:
        """Number a command before it is given."""
        return Call(next(self._numbers))

    def ask(self, command: FromParent, *arguments: Any) -> Call:
        """Give a command; see :meth:`give`."""
        call = self.new_call()
        self.give(call, command, *arguments)
        return call

    def give(self, call: Call, command: FromParent, *arguments: Any) -> None:
        """Give a command; ``call`` is settled with what it returns.

        Raises:
            ServerNotRunningError: this process was forked from the one that made the server.
        """
        self.check_process()
        self.call_soon(partial(self.send, call, command, dumps(arguments)))

    def call_soon(self, job: Callable[[], None]) -> None:
        """Do ``job`` on the thread, in order.

        If the thread has ended, :attr:`refusal` says why, and ``job`` is done here, or here and there; it must do then
        no more than fail what is not settled.
        """
        self._jobs.append(job)
        poller = self._poller
        if poller is not None:
            poller.notify()
        if self._over:  # the thread may have seen the job, or not
            job()

    def send(self, call: Call, command: FromParent, payload: bytes) -> None:
        """Send a command (a job of the thread)."""
        ends_a_pause = command is FromParent.RESUME and self.serves and not self._over  # which a drain waits for
        if self.refusal is not None and not ends_a_pause:
            self._settle(call, clone_exception(self.refusal))
            return
        self._calls[call.number] = call
        self._wire.send(frame(header(command, call.number), payload))

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.began = True
        if self.refusal is not None:
            self.end_unlaunched()
            return
        try:
            self._poller = Selector()
            self._wire, self._process = self._launch()
        except BaseException as error:  # a factory that does not pickle may raise anything
            self._fail_to_launch(error)
            return
        self.pid = self._process.pid
        try:
            self._attend()
        except BaseException:
            _log.exception("the connection to the server's process %d failed; it is killed", self.pid)
            self._refuse("was killed, because the connection to it failed")
            self._process.kill()
        finally:
            self._finish()

    def _fail_to_launch(self, error: BaseException) -> None:
        what = f"{type(error).__qualname__}: {clone_exception(error)}"
        self.refusal = self.refusal or ServerClosedError(f"the server could not be started: {what}")
        start_error = ServerStartError(f"the server's process could not be started: {what}")
        start_error.__cause__ = error
        self._poller = None
        self.ready.fail(start_error)
        self.end_unlaunched()
        self._run_jobs()

    def _attend(self) -> None:
        poller = self._poller
        assert poller is not None
        poller.register(self._wire, self._read)
        poller.register(self._process, self._hear_exit)
        while not self._exited:
            self._run_jobs()
            if self._wire.unsent != self._watches_room and not self._hung_up:
                self._watches_room = self._wire.unsent
                poller.register(self._wire, self._read, writable=self._watches_room)
            left = self._kill_at - time.monotonic()
            poller.wait(None if left == math.inf else max(0.0, left))
            if time.monotonic() >= self._kill_at:
                self._kill_at = math.inf
                if self._hung_up:
                    self._refuse("has closed its connection, and was killed")
                self._process.kill()
        while not self._hung_up and self._wire.readable():  # what it said last
            self._read()

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _hear_exit(self) -> None:
        self._exited = True

    def _shut_down(self, timeout: float | None, drain: bool) -> None:
        if self._over:
            return
        if not self.serves:
            self._process.kill()
            return
        self._wire.send(frame(header(FromParent.SHUTDOWN), dumps((timeout, drain))))
        if timeout is not None:
            self._kill_at = min(self._kill_at, time.monotonic() + timeout + PARTING)

    def _read(self) -> None:
        try:
            if self._wire.unsent:
                self._wire.flush()
            _, frames = self._wire.receive()
        except EOFError:
            self._hung_up = True
            self._kill_at = min(self._kill_at, time.monotonic() + _HUNG_UP)
            if self._poller is not None:
                self._poller.unregister(self._wire)
            return
        for text, payload in frames:
            self._handle(FromChild(text >> 60), text & NUMBER, payload or b"")

    def _handle(self, kind: FromChild, number: int, payload: bytes) -> None:
        if kind is FromChild.READY:
            self.ready.succeed(None)
        elif kind is FromChild.FAILED:
            self.ready.fail(_start_error(payload))
        elif (call := self._calls.pop(number, None)) is not None:  # one that nobody waits for may be answered twice
            try:
                outcome = load_exception(payload) if kind is FromChild.ERROR else loads(payload)
            except BaseException as error:  # a class of the user's may raise anything
                outcome, kind = clone_exception(error), FromChild.ERROR
            self._settle(call, outcome if kind is FromChild.ERROR else None, outcome)

    def _settle(self, call: Call, error: BaseException | None, value: Any = None) -> None:
        if error is None:
            call.succeed(value)
        else:
            call.fail(error)
        if call.then is not None:
            call.then(call)

    def _refuse(self, what: str) -> None:
        self.refusal = self.refusal or PeerDiedError(f"the server's process {what}")

    def _finish(self) -> None:
        code = None
        try:
            code = self._process.reap()
        except Exception:  # who waits must hear of the end in any case
            _log.exception("the exit code of the server's process %d is lost", self.pid)
        self._refuse(f"is gone: {_described(code)}")
        error = self.refusal
        assert error is not None
        self._wire.close()
        self._release()
        self._poller = None
        self._over = True
        self.ended.succeed(code)  # before the calls: who hears of the end finds it so
        closed = isinstance(error, ServerClosedError)
        self.ready.fail(clone_exception(error) if closed else ServerStartError(f"{error}; it has not served yet"))
        while self._calls:
            _, call = self._calls.popitem()
            self._settle(call, clone_exception(error))
        self._run_jobs()


def _start_error(payload: bytes) -> ServerStartError:
    text, original = loads(payload)
    error = ServerStartError(f"the server's process could not start:\n\n{text}")
    if original is not None:
        with suppress(BaseException):  # it may be of a class that this process does not know, or does not unpickle
            error.__cause__ = load_exception(original)
    return error


def _described(code: int | None) -> str:
    if code is None:
        return "nobody knows how it ended"
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
