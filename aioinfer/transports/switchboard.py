"""The server's end of the wires to other processes."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import FramedSocket, Listener, wait_for_any
from aioinfer.transports.line import Board, Line

__all__ = ["Switchboard"]

# Seconds until a server that was out of descriptors listens again.
_DEAF = 0.5
# Seconds for which processes may keep their server from ending: if nothing gets on, and in any case.
_NO_PROGRESS = 0.5
_GOODBYE = 2.0

_log = logging.getLogger("aioinfer")


class Switchboard:
    """Answers processes that dial, and watches the lines to them.

    The door is for those that have not said yet who they are. An event loop watches it, so that a process is taken in
    also while the model is busy. The lines of the others are the model thread's to watch.

    Args:
        make_line: makes the line for a wire.
        listener: where they dial.
        count_refusal: called for each request that was refused at a client.
    """

    def __init__(
        self, make_line: Callable[[FramedSocket, Board], Line], listener: Listener, count_refusal: Callable[[], None]
    ) -> None:
        self.poller = Selector()
        self.door = Selector(self.poller.lock)
        self.listener = listener
        self.count_refusal = count_refusal
        self.lines: dict[Line, bool] = {}
        """Those that are up, and whether they are watched for room to write."""
        self._make_line = make_line
        self._lock = threading.Lock()  # guards the lines
        self.door.register(self.listener, self._accept)
        self.poller.register(self.door, self.door.poll)  # for when there is no event loop, or it waits for us

    def move_to(self, poller: Selector) -> None:
        """Be watched by another poller, that several boards share; before anybody waits."""
        if poller is self.poller:
            return
        with self.poller.lock, poller.lock:
            self.poller.unregister(self.door)
            poller.register(self.door, self.door.poll)
            for line, writable in self.lines.items():
                if line.joined:
                    self.poller.unregister(line.wire)
                    poller.register(line.wire, line.read, writable=writable)
            self.poller, self.door.lock = poller, poller.lock

    def move(self, line: Line) -> None:
        """A line has joined: the model thread watches it from now on."""
        self.door.unregister(line.wire)
        self.poller.register(line.wire, line.read)

    def open(self) -> None:
        """Answer who dials."""
        if not self.listener.is_open:
            self.listener.open()
            self.door.register(self.listener, self._accept)

    def read_all(self) -> None:
        """Read all that has arrived on any line, whatever a poller says."""
        with self.poller.lock:
            for line in list(self.lines):
                line.read_all()

    def read_joined(self) -> None:
        """Do as :meth:`read_all`, for the lines of processes that have said who they are."""
        with self.poller.lock:
            for line in [line for line in self.lines if line.joined]:
                line.read_all()

    def give_away(self) -> int:
        """Answer nobody, and return the listening descriptor, by which another process can."""
        with self.poller.lock:
            self.door.unregister(self.listener)
            return self.listener.give_away()

    def close(self) -> None:
        """Answer nobody new; the lines that are up stay, but for those of processes that have not said who they are."""
        with self.poller.lock:
            if self.listener.is_open:
                self._accept()
                self.door.unregister(self.listener)
                self.listener.close()
            for line in [line for line in self.lines if not line.joined]:
                self.drop(line)

    def _accept(self) -> None:
        while True:
            try:
                sock = self.listener.accept()
                if sock is None:
                    return
                self._take_in(sock)
            except OSError:  # no descriptors are left, or no memory: whoever dials waits
                self.door.unregister(self.listener)
                again = threading.Timer(_DEAF, self._listen_again)
                again.daemon = True
                again.start()
                return

    def _take_in(self, sock: socket.socket) -> None:
        wire = FramedSocket(sock)
        try:
            line = self._make_line(wire, self)
            with self._lock:
                self.lines[line] = False
            try:
                self.door.register(wire, line.read)
            except BaseException:
                self.drop(line)
                raise
        except BaseException:
            wire.close()
            raise
        line.read()

    def _listen_again(self) -> None:
        with self.poller.lock:
            if self.listener.is_open:
                self.door.register(self.listener, self._accept)

    def finish(self) -> None:
        """Send what is left to send, and read what is half read, while that gets on; hang up on the rest."""
        give_up_at = time.monotonic() + _GOODBYE
        while busy := [line for line in list(self.lines) if line.wire.unsent or line.wire.has_partial_frame]:
            if time.monotonic() > give_up_at or not wait_for_any([line.wire for line in busy], _NO_PROGRESS):
                break
            with self.poller.lock:
                for line in busy:
                    line.wire.flush()
                    self.watch(line)
                    line.read_all()
        for line in busy:
            self.drop(line)

    def watch(self, line: Line) -> None:
        """Watch a line also for room to write, while something is unsent; called whenever that may have changed."""
        if line.wire.unsent or self.lines.get(line):
            with self.poller.lock:
                writable = line.wire.unsent  # by now: whoever comes last sees what there is
                if self.lines.get(line, writable) != writable:
                    self.lines[line] = writable
                    (self.poller if line.joined else self.door).register(line.wire, line.read, writable=writable)

    def drop(self, line: Line) -> None:
        """Hang up."""
        with self.poller.lock:
            with self._lock:
                known = self.lines.pop(line, None)
            if known is not None:
                (self.poller if line.joined else self.door).unregister(line.wire)
                line.leave()  # first: whoever hears of the end may join anew at once
                line.wire.close()
