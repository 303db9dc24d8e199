"""What runs in a worker: a process with a host of environments, which does what the collector's process says.

Both ends of the connection send frames, whose payloads are pickled. What a host is told or says is not looked at here,
but for the message that ends it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from aioinfer.ipc.pickling import dumps, loads
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import NUMBER, FramedSocket, frame, header

__all__ = ["Host", "HostFactory", "Kind", "run"]

# Seconds that a worker has to close its environments when its parent is gone, and then its process to exit.
_ORPHAN_GRACE = 1.0
_EXIT_GRACE = 1.0


class Kind(IntEnum):
    """What a frame's payload is. Its number says how many descriptors came along."""

    CONFIG = 1
    """To a worker, first of all: what makes its host, the configuration of that, and the message that ends it."""
    MESSAGE = 2
    """To the host, or from it."""
    FAILED = 3
    """From a worker, which exits: the text of a traceback."""


class Host(Protocol):
    """What a worker runs."""

    def make(self) -> None:
        """Make the environments. Runs on the main thread, and may block."""
        ...

    def handle(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Do what a message says, also while ``make`` runs. Descriptors are the host's from now on."""
        ...

    def join(self, timeout: float | None) -> bool:
        """After the message that ends the host: wait until all of its threads have ended."""
        ...


HostFactory = Callable[[Any, Callable[[Any], None]], Host]
"""Makes a host of its configuration and of a function that any thread may call, to send a message."""


def run(control: socket.socket, lifeline: socket.socket) -> None:
    """Run a host until a message ends it, or the parent is gone.

    Args:
        control: the connection to the parent.
        lifeline: another one, on which nothing is sent: its end is the parent's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control.set_inheritable(False)
    lifeline.set_inheritable(False)
    _end_with_parent(lifeline)
    torch.set_num_threads(1)
    # What a fork server forks would draw the same numbers in every worker, and again in one that is restarted.
    np.random.seed()
    torch.default_generator.seed()
    worker = _Worker(FramedSocket(control))
    try:
        worker.start()
        worker.wait()
    except BaseException as error:
        worker.fail(error)
    gc.freeze()  # exempts all that torch has made from the garbage collection at exit
    threading.Thread(target=_exit_after, args=(_EXIT_GRACE, 0), name="aioinfer-exit", daemon=True).start()


class _Worker:
    """The host, and the connection to the parent.

    The main thread makes the host and its environments; another one receives messages and hands them to the host.

    Args:
        sock: connected to the parent.
    """

    def __init__(self, sock: FramedSocket) -> None:
        self._sock = sock
        self._selector = Selector()  # wakes the thread that receives, also for what could not be sent at once
        self._frames: deque[tuple[int, bytes]] = deque()  # received and not handled
        self._descriptors: dict[int, None] = {}  # received, in order, and not given to the host
        self._stopped = threading.Event()  # the host was told to end
        self._host: Host
        self._stop: Any  # the message that ends it

    def start(self) -> None:
        """Make the host and its environments."""
        while not self._frames:
            self._sock.wait(None)
            self._receive()
        head, config = self._frames.popleft()
        assert head >> 60 == Kind.CONFIG
        factory, arguments, self._stop = loads(config)
        self._host = factory(arguments, self._report)
        threading.Thread(target=self._serve, name="aioinfer-control", daemon=True).start()
        self._host.make()

    def wait(self) -> None:
        """Block until the host has ended, and everything is sent."""
        self._stopped.wait()
        self._host.join(None)
        self._flush()

    def fail(self, error: BaseException) -> NoReturn:
        """Send the parent the text of an error, and exit."""
        text = f"{type(error).__qualname__}: (its message can't be shown)"
        with suppress(BaseException):  # an exception of the user's may raise anything where it is formatted
            text = "".join(traceback.format_exception(error))
        self._sock.send(frame(header(Kind.FAILED), text.encode(errors="replace")))
        self._flush()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(1)

    def _report(self, message: Any) -> None:
        if not self._sock.send(frame(header(Kind.MESSAGE), dumps(message))):
            self._selector.notify()  # the thread that receives sends the rest

    def _flush(self) -> None:
        while self._sock.unsent:
            self._sock.wait_writable(None)
            self._sock.flush()

    # -- the thread that receives ----------------------------------------------------------------------

    def _serve(self) -> None:
        awaits_writable: bool | None = None
        try:
            while True:
                self._handle()
                if self._sock.unsent is not awaits_writable:
                    awaits_writable = self._sock.unsent
                    self._selector.register(self._sock, self._receive, writable=awaits_writable)
                self._selector.wait(None)
        except BaseException as error:
            self.fail(error)

    def _receive(self) -> None:
        if self._sock.unsent:
            self._sock.flush()
        try:
            frames, rest = self._sock.peek_descriptors(self._descriptors)
        except EOFError:  # the parent is gone
            if hasattr(self, "_host"):
                self._give(self._stop, ())
            _exit_after(_ORPHAN_GRACE, 1)
        if rest is not None:
            self._sock.inbox = rest
            self._frames.extend([(head, payload or b"") for head, payload in frames])

    def _handle(self) -> None:
        while self._frames:
            head, payload = self._frames.popleft()
            descriptors = [*self._descriptors][: head & NUMBER]
            for descriptor in descriptors:
                del self._descriptors[descriptor]
            self._give(loads(payload), descriptors)

    def _give(self, message: Any, descriptors: Sequence[int]) -> None:
        self._host.handle(message, descriptors)
        if isinstance(message, type(self._stop)):
            self._stopped.set()


# -- the end -----------------------------------------------------------------------------------------------


def _exit_after(seconds: float, code: int) -> NoReturn:
    """Exit, whatever other threads do, or whatever an environment has left to be done at exit."""
    time.sleep(seconds)
    os._exit(code)


def _end_with_parent(lifeline: socket.socket) -> None:
    """Exit when the parent is gone, whatever the environments do, within two seconds.

    A thread does so, unless an environment holds the GIL. So, on Linux, the kernel sends SIGHUP too, whose handler is
    the C function ``alarm``: it is called with the signal's number, which is 1, so that SIGALRM comes in a second, and
    ends the process. A program that ignores SIGHUP (``nohup``) may get one from its terminal, as may its workers: the
    kernel sends those SIGKILL at once.

    The death of a parent's thread (``PR_SET_PDEATHSIG``) is of no use: the parent of what a fork server has forked is
    the fork server, which lives as long as one of those does.
    """
    threading.Thread(target=_exit_with_parent, args=(lifeline,), name="aioinfer-parent", daemon=True).start()
    if not hasattr(fcntl, "F_SETSIG"):
        return
    number = signal.SIGKILL
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        number = signal.SIGHUP
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGALRM})
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.signal.restype = ctypes.c_void_p
        library.signal(number, ctypes.cast(library.alarm, ctypes.c_void_p))
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, number)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _exit_with_parent(lifeline: socket.socket) -> None:
    poll = select.poll()
    poll.register(lifeline, 0)  # only POLLHUP
    poll.poll()
    _exit_after(_ORPHAN_GRACE, 1)
