"""Threads that wait for answers on one wire: one reads at a time, for all of them."""

from __future__ import annotations

from collections import deque
from typing import Any

from aioinfer.transports.receivers import Waiter
from aioinfer.wakers import LockWaker

__all__ = ["Turns"]


class Turns:
    """Leader and followers: who leads reads, and whoever gives the lead up lets the first in line lead.

    Any thread. A thread may be interrupted anywhere by an exception of a signal's handler; so there is no lock that
    it could keep. Who leads is told by one atomic step of a dictionary, and what ends a turn may be called again when
    it was interrupted itself.
    """

    def __init__(self) -> None:
        self.leader: dict[int, Any] = {}
        """Who leads, as the only value: ``setdefault(0, who) is who`` takes the lead if it is free."""
        self._line: deque[Waiter] = deque()

    def line_up(self, waiter: Waiter) -> None:
        """Wait for the lead: ``waiter.bell`` rings when it may be free. Try to take it once more before waiting."""
        waiter.bell = waiter.bell or LockWaker()
        self._line.append(waiter)

    def step_out(self, waiter: Waiter) -> None:
        """Wait for the lead no more."""
        try:
            self._line.remove(waiter)
        except ValueError:  # it was not in line
            pass

    def give_up(self, who: Any) -> None:
        """Give the lead back, if ``who`` has it; the first in line is told if it is free."""
        if self.leader.get(0) is who:
            del self.leader[0]
        if self._line and not self.leader:
            try:
                bell = self._line[0].bell
            except IndexError:  # nobody is in line any more
                return
            if bell is not None:
                bell.notify()
