"""What a client process has asked and has no answer to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, TypeAlias

from aioinfer.errors import own_error
from aioinfer.transports.outlets import Outlet

__all__ = ["Calls"]

Unload: TypeAlias = Callable[[Sequence[int], Iterable[bytes | None]], Sequence[Any]]


class Calls(dict[int, tuple[Any, Outlet]]):
    """By number, the receiver of an answer and the way there. Whoever takes a call out settles it; any thread."""

    def hand_out(self, numbers: Sequence[int], payloads: Iterable[bytes | None], unload: Unload) -> None:
        """Settle what has come, with what ``unload`` makes of it; what was given up is dropped."""
        calls = list(map(self.pop, numbers, repeat(None)))
        if not all(calls):  # some were given up
            found = [one for one in zip(calls, numbers, payloads, strict=False) if one[0] is not None]
            if not found:
                return
            calls, numbers, payloads = [list(part) for part in zip(*found, strict=True)]
        receivers, outlets = zip(*calls, strict=True)
        try:
            replies = unload(numbers, payloads)
        except BaseException as error:  # also of a thread that is interrupted while it reads for others
            _settle(receivers, outlets, [own_error(error) for _ in receivers])
            raise
        _settle(receivers, outlets, replies)

    def fail(self, number: int, error: Exception) -> None:
        """Settle one with an error."""
        call = self.pop(number, None)
        if call is not None:
            call[1].fail([call[0]], [error])

    def fail_all(self, error: Exception) -> None:
        """Settle all of them with an error, each with one of its own."""
        for number in list(self):
            self.fail(number, own_error(error))


def _settle(receivers: Sequence[Any], outlets: Sequence[Outlet], replies: Sequence[Any]) -> None:
    first = outlets[0]
    if outlets.count(first) == len(outlets) and not any(map(isinstance, replies, repeat(Exception))):
        first.deliver(receivers, replies)
        return
    for receiver, outlet, reply in zip(receivers, outlets, replies, strict=True):
        if isinstance(reply, Exception):
            outlet.fail([receiver], [reply])
        else:
            outlet.deliver([receiver], [reply])
