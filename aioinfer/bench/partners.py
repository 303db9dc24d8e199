"""The other process of a measurement, where it takes two: it plays its part, and answers what it is asked."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch

__all__ = ["Partner", "Pipe"]

Pipe: TypeAlias = "Connection[Any, Any]"

_END_LIMIT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


class Partner:
    """A process that plays a part: it says when it is ready, and answers each question. Any thread may wait for it.

    It ends with the ``with`` block, or when this process does.

    Args:
        play: a function of some module, which gets its end of a pipe, and ``details``.
        details: a scheme may be among them, or clients.
        fork: whether the process inherits everything from this one, which has no other threads yet: fork would hand
            over their locks as they are. It saves the imports of many processes. Otherwise ``details`` are pickled.

    Raises:
        RuntimeError: it failed to get ready.
    """

    def __init__(self, play: Callable[..., None], *details: object, fork: bool = False) -> None:
        context: BaseContext = multiprocessing.get_context("fork" if fork else "spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(theirs, play, details), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        try:
            self.answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def tell(self, message: object) -> None:
        """Send a message; ``answer`` waits for what comes back."""
        self._pipe.send(message)

    def answer(self) -> Any:
        """Wait for the next answer.

        Raises:
            RuntimeError: the other process failed.
        """
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("the other process died") from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"the other process failed: {answer.reason}")
        return answer

    def ask(self, question: object) -> Any:
        """Send a question and wait for its answer."""
        self.tell(question)
        return self.answer()

    def close(self) -> None:
        """Let the process end."""
        self._pipe.close()
        self._process.join(_END_LIMIT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _play(pipe: Pipe, play: Callable[..., None], details: tuple[object, ...]) -> None:
    os.dup2(2, 1)  # on standard output, the measurement talks to the one who started it
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        play(pipe, *details)
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        with suppress(OSError):
            pipe.send(_Failure(f"{type(error).__qualname__}: {error}"))
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
