"""What a client process has asked and has no answer to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, TypeAlias

from aioinfer.errors import clone_exception
from aioinfer.transports.replies import ReplySink

__all__ = ["Calls", "Unload"]

Call: TypeAlias = tuple[Any, ReplySink]
Unload: TypeAlias = Callable[[Sequence[int], Iterable[Any]], Sequence[Any]]


class Calls(dict[int, Call]):
    """By number, the receiver of an answer and the way there.

    Any thread adds and takes out. ``hand_out`` is for one thread at a time, which may be interrupted anywhere by an
    exception of a signal's handler: called again with the same, it goes on where it was. So a receiver may be settled
    twice, and takes the first answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handing: tuple[list[Call | None], Sequence[Any]] | None = None  # taken out, and their answers

    def hand_out(self, numbers: Sequence[int], payloads: Iterable[Any], unload: Unload) -> None:
        """Settle what has come, with what ``unload`` makes of it; what was given up is dropped."""
        if not numbers:
            return
        if self._handing is None:
            self._handing = [], unload(numbers, payloads)
        taken, answers = self._handing
        if not taken:  # a client may ask again once its call is not here any more, and its answer must be read by then
            taken.extend(map(self.pop, numbers, repeat(None)))
        _settle(taken, answers)
        self._handing = None

    def fail(self, number: int, error: Exception) -> None:
        """Settle one with an error."""
        call = self.get(number)
        if call is not None:
            call[1].set_exceptions([call[0]], [error])
            self.pop(number, None)

    def fail_all(self, error: Exception) -> None:
        """Settle all of them with an error, each with one of its own."""
        for number in list(self):
            self.fail(number, clone_exception(error))


def _settle(calls: Sequence[Call | None], answers: Sequence[Any]) -> None:
    """Hand each call its answer, all at once where they go the same way."""
    if all(calls) and not any(map(isinstance, answers, repeat(Exception))):
        receivers, sinks = zip(*calls, strict=True)
        if sinks.count(sinks[0]) == len(sinks):
            sinks[0].set_results(receivers, answers)
            return
    for call, answer in zip(calls, answers, strict=True):
        if call is None:  # it was given up
            continue
        receiver, sink = call
        if isinstance(answer, Exception):
            sink.set_exceptions([receiver], [answer])
        else:
            sink.set_results([receiver], [answer])
