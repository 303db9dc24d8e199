"""A process that serves, as its parent sees it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

__all__ = ["ChildProcess", "handed_over"]

# By thread, how to close what that one hands to a process just now.
_in_transit: dict[int, tuple[Callable[[], None], ...]] = {}


@contextmanager
def handed_over(*closers: Callable[[], None]) -> Iterator[None]:
    """Start a process that inherits descriptors, and close them here; a process that another thread forks has none."""
    _in_transit[threading.get_ident()] = closers
    try:
        yield
    finally:
        del _in_transit[threading.get_ident()]
        for close in closers:
            close()


def _close_those_of_others() -> None:
    for thread, closers in _in_transit.items():
        if thread != threading.get_ident():
            for close in closers:
                close()
    _in_transit.clear()


os.register_at_fork(after_in_child=_close_those_of_others)


class ChildProcess:
    """Starts a process. One thread waits for its end and reaps it; any may kill it.

    Args:
        context: starts it.
        target: what runs in it.
        arguments: of the target.

    Attributes:
        pid: of the process.
    """

    def __init__(self, context: BaseContext, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        method = context.get_start_method()
        self._process: Any = context.Process(target=target, args=arguments, name="aioinfer-server", daemon=True)  # type: ignore[attr-defined]
        _check_descriptors()
        with _interrupts_wait(method):
            self._process.start()
        self.pid: int = self._process.pid
        # Unlike the sentinel, this can't be held open by processes that the process has forked.
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # of an old kernel, or in a sandbox
                self._descriptor = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """What is readable when the process has ended."""
        return int(self._process.sentinel) if self._descriptor is None else self._descriptor

    def kill(self) -> None:
        """Kill it, if it runs."""
        with suppress(OSError, ValueError):  # it has just ended
            self._process.kill()

    def reap(self) -> int | None:
        """Take the exit code of a process that has ended; once. ``None`` if somebody else has."""
        self._process.join()
        code: int | None = self._process.exitcode
        with suppress(ValueError):
            self._process.close()
        if self._descriptor is not None:
            with suppress(
                OSError
            ):  # a program that closes all of its descriptors must not keep us from saying how it was
                os.close(self._descriptor)
        return code


def _check_descriptors() -> None:
    """Raise :class:`OSError` if few are left: a start that finds one for the first of its pipes only leaves it open."""
    with ExitStack() as spare:
        for _ in range(3):
            for descriptor in os.pipe():
                spare.callback(os.close, descriptor)


@contextmanager
def _interrupts_wait(method: str) -> Iterator[None]:
    """Start a process in which Ctrl-C waits, until it can say that it ignores it."""
    if method != "fork":
        resource_tracker.ensure_running()  # as it starts, it lets interrupts through
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
