"""Programs that tests run and look at from outside. They begin in a moment, as a process that has torch forks them."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

from tests.limits import HANG

__all__ = ["NUMBER", "Program", "running"]

ROOT = Path(__file__).parent.parent
NUMBER = struct.Struct("i")  # what is told of a program: its process, and later its exit status


@cache
def launcher() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the process that starts programs; it ends when this one does."""
    line, other = socket.socketpair()
    with other:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher", str(other.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
        )
    return line, process


class Program:
    """A program in a process, and a session, of its own.

    Attributes:
        pid: of the process.
        stdin: what it reads.
        stdout: what it prints.
    """

    def __init__(self, stack: ExitStack, words: list[str]) -> None:
        reader, stdin = os.pipe()
        stdout, writer = os.pipe()
        self.stdin = stack.enter_context(os.fdopen(stdin, "w"))
        self.stdout = stack.enter_context(os.fdopen(stdout))
        self._errors = stack.enter_context(TemporaryFile())  # noqa: SIM115
        self._news, watcher = socket.socketpair()
        stack.enter_context(self._news)
        theirs = (reader, writer, os.dup(self._errors.fileno()), watcher.detach())
        socket.send_fds(launcher()[0], ["\0".join(words).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.pid = self._hear(HANG)
        self._status: int | None = None

    @property
    def errors(self) -> str:
        """What it, and all that it has started, have said of errors so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode()

    def wait(self, timeout: float = HANG) -> int:
        """Wait for its end, and return its exit status: of one that is killed the signal's number, negative."""
        if self._status is None:
            self._status = self._hear(timeout)
        return self._status

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self._status is None and not select.select([self._news], [], [], 0)[0]:
            with suppress(ProcessLookupError):  # the launcher has just reaped it, and is about to say so
                os.kill(self.pid, signal.SIGKILL)

    def _hear(self, timeout: float) -> int:
        self._news.settimeout(timeout)
        (number,) = NUMBER.unpack(self._news.recv(NUMBER.size))
        return int(number)


@contextmanager
def running(program: Path, *arguments: str, warnings: str = "") -> Iterator[Program]:
    """A program that may import the tests; it is gone afterwards, but not what it has started.

    Args:
        program: its file.
        arguments: of the program.
        warnings: what becomes of them, as after ``python -W``; what Python does with them itself by default.
    """
    with ExitStack() as stack:
        started = Program(stack, [warnings, str(program), *arguments])
        try:
            yield started
        finally:
            started.kill()
            started.wait()
