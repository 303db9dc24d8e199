"""Threads that wait for answers on one wire: one reads at a time, for all of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from aioinfer.transports.bells import LockBell
from aioinfer.transports.receivers import Waiter

__all__ = ["Turns"]

Read = Callable[[Waiter, float | None], bool]

# Seconds for which a thread that reads for others waits for more to do.
_LINGER = 1.0


class Turns:
    """Whoever waits takes the turn if it is free, and reads until it has its own answer; then the next in line reads.

    ``read``, which is passed each time, blocks for up to so many seconds, or for ever, until something has come or the
    waiter has its answer, and settles what has come; it says whether more can come.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._line: deque[Waiter] = deque()
        self._over = False
        self._reader_lock = threading.Lock()  # guards whether there is one
        self._reader: threading.Thread | None = None

    def take(self) -> bool:
        """Take the turn, if it is free; say whether it was."""
        return self._turn.acquire(blocking=False)

    def give_back(self) -> None:
        """Let the next in line read."""
        self._turn.release()
        self._pass_on()

    def wait(self, read: Read, waiter: Waiter, timeout: float | None) -> None:
        """Block until ``waiter`` has its answer, nothing more can come, or ``timeout`` seconds passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        in_line = False
        try:
            while not waiter.done and not self._over:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                if self._turn.acquire(blocking=False):
                    try:
                        self._over = not read(waiter, left)
                    finally:
                        self._turn.release()
                elif in_line and waiter.bell is not None:
                    waiter.bell.wait(left)
                    in_line = False
                else:  # first, and then once more for the turn: who has it passes it on to the line afterwards
                    waiter.bell = waiter.bell or LockBell()
                    self._line.append(waiter)
                    in_line = True
        finally:
            waiter.gone = True
            self._pass_on()

    def _pass_on(self) -> None:
        while self._line and not self._turn.locked():
            try:
                waiter = self._line.popleft()
            except IndexError:  # another thread was quicker
                return
            if not waiter.done and not waiter.gone and waiter.bell is not None:
                waiter.bell.ring()
                if not self._over:
                    return

    def wait_while(self, wanted: Callable[[], bool], wait: Callable[[float], None]) -> None:
        """See to it that a thread waits, for those who don't themselves, until a while after ``wanted`` ends.

        Args:
            wanted: says whether anybody else needs it.
            wait: waits for so many seconds.
        """
        with self._reader_lock:
            if self._reader is None:
                self._reader = threading.Thread(
                    target=self._wait_for_others, args=(wanted, wait), name="aioinfer-replies", daemon=True
                )
                self._reader.start()

    def _wait_for_others(self, wanted: Callable[[], bool], wait: Callable[[float], None]) -> None:
        while True:
            wait(_LINGER)
            with self._reader_lock:
                if not wanted():
                    self._reader = None
                    return
