"""The parent's end of the line to a process that serves: commands, their answers, and the news of its end."""

from __future__ import annotations

import itertools
import os
import select
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from aioinfer.errors import InferenceError, PeerDiedError, ServerClosedError, ServerStartError, own_error
from aioinfer.hosting.orders import FromChild, FromParent
from aioinfer.hosting.process import ChildProcess
from aioinfer.transports.parcels import pack, unpack, unpack_error
from aioinfer.transports.wire import NUMBER, Frame, Wire, frame, word

__all__ = ["Hotline"]

# Seconds that a process which has hung up has to end, so that the error can say how it did.
_PARTING = 1.0


class Hotline:
    """Any thread: the public methods. ``_lock`` guards the calls, and why none is taken any more.

    A thread reads the answers until the process has ended, and reaps it.

    Args:
        wire: to the process.
        process: it runs.

    Attributes:
        pid: of the process.
        ready: resolves when the process serves, or fails with why it does not.
        ended: resolves to the exit code.
    """

    def __init__(self, wire: Wire, process: ChildProcess) -> None:
        self.pid = process.pid
        self.ready: Future[None] = Future()
        self.ended: Future[int | None] = Future()
        self._owner = os.getpid()
        self._wire = wire
        self._process = process
        self._numbers = itertools.count()
        self._calls: dict[int, Future[Any]] = {}
        self._refusal: InferenceError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._attend, name="aioinfer-host", daemon=True)
        self._thread.start()

    # -- commands --------------------------------------------------------------------------------------

    def ask(self, command: FromParent, *arguments: Any) -> Future[Any]:
        """Give a command; the future, which can't be cancelled, resolves to what it returns.

        Raises:
            RuntimeError: this process was forked from the one that started the server.
            ServerClosedError: the server is shut down, or about to.
            PeerDiedError: its process is gone.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self.check()
            number = next(self._numbers)
            self._calls[number] = future
        self._wire.send(frame(word(command, number), pack(arguments)))
        return future

    def check(self) -> None:
        """Raise what ``ask`` would."""
        if self._owner != os.getpid():
            raise RuntimeError(
                f"process {self._owner} has started the server, this is process {os.getpid()}; hand clients over"
            )
        if self._refusal is not None:
            raise own_error(self._refusal)

    @property
    def serves(self) -> bool:
        """Whether the process has begun to serve, though it may have ended since."""
        return self.ready.done() and self.ready.exception() is None

    @property
    def refusal(self) -> str:
        """Why no command is taken any more; empty if they are."""
        return "" if self._refusal is None else str(self._refusal)

    def close(self, timeout: float | None, *, drain: bool) -> None:
        """Take no more commands, and have the process shut down; one that has not begun to serve is killed."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._refusal = self._refusal or ServerClosedError("the server is shut down")
        if self.serves:
            self._wire.send(frame(word(FromParent.SHUTDOWN), pack((timeout, drain))))
        else:
            self._process.kill()

    def wait(self, timeout: float | None) -> bool:
        """Wait until the process has ended, or killed it if ``timeout`` seconds passed; say whether it has ended."""
        if self._owner != os.getpid():
            return True
        for seconds in (timeout, _PARTING):
            if wait([self.ended], seconds).done:
                if threading.current_thread() is not self._thread:
                    self._thread.join()
                return True
            self._process.kill()
        return False

    # -- the thread ------------------------------------------------------------------------------------

    def _attend(self) -> None:
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(self._process, select.POLLIN)
        try:
            while all(descriptor != self._process.fileno() for descriptor, _ in poll.poll()):
                self._read()
            poll.unregister(self._process)
            while poll.poll(0):  # what it said last
                self._read()
        except EOFError:
            poll = select.poll()
            poll.register(self._process, select.POLLIN)
            if not poll.poll(_PARTING * 1000):
                self._fail(self._refuse("has hung up"))
                poll.poll()
        code = self._process.reap()
        unanswered = self._refuse(f"is gone: {_described(code)}")
        self._wire.close()
        self.ended.set_result(code)  # before the calls: who hears of the end finds it so
        self._fail(unanswered)

    def _read(self) -> None:
        _, frames = self._wire.receive()
        self._handle(frames)
        if self._wire.unsent:  # each command is answered, so that there is always something to read afterwards
            self._wire.flush()

    def _handle(self, frames: Sequence[Frame]) -> None:
        for text, payload in frames:
            kind, payload = text >> 60, payload or b""
            if kind == FromChild.READY:
                self.ready.set_result(None)
            elif kind == FromChild.FAILED:
                self.ready.set_exception(_start_error(payload))
            else:
                with self._lock:
                    future = self._calls.pop(text & NUMBER)
                _settle(future, payload, failed=kind == FromChild.ERROR)

    def _refuse(self, what: str) -> Sequence[Future[Any]]:
        """Take no more calls, and return those that have no answer."""
        with self._lock:
            self._refusal = self._refusal or PeerDiedError(f"the server's process {what}")
            calls, self._calls = self._calls, {}
        return list(calls.values())

    def _fail(self, calls: Sequence[Future[Any]]) -> None:
        error = self._refusal
        assert error is not None
        for future in calls:
            future.set_exception(own_error(error))
        if not self.ready.done():
            closed = isinstance(error, ServerClosedError)
            self.ready.set_exception(error if closed else ServerStartError(f"{error}; it has not served yet"))


def _settle(future: Future[Any], payload: bytes, *, failed: bool) -> None:
    try:
        outcome = unpack_error(payload) if failed else unpack(payload)
    except Exception as error:  # a class of the user's may raise anything
        future.set_exception(error)
    else:
        if failed:
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _start_error(payload: bytes) -> ServerStartError:
    text, original = unpack(payload)
    error = ServerStartError(f"the server's process could not start:\n\n{text}")
    if original is not None:
        with suppress(Exception):  # it may be of a class that this process does not know
            error.__cause__ = unpack_error(original)
    return error


def _described(code: int | None) -> str:
    if code is None:
        return "nobody knows how it ended"
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
