"""The other process of a measurement between two: it runs a function, and answers questions over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Self, TypeAlias

import torch

Pipe: TypeAlias = "Connection[Any, Any]"

_END_LIMIT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


class PeerProcess:
    """A process that runs ``function``, which sends one message when it is ready and one answer for each question.

    One thread at a time uses it, any one. The process ends with the ``with`` block, or when this process does.

    Args:
        function: a function of a module, which gets its end of the pipe, and ``arguments``.
        arguments: may hold schemes and clients.
        fork: whether the process inherits everything from this one, which has no other threads yet, since fork would
            copy their locks as they are. It saves the imports of many processes. Otherwise ``arguments`` are pickled.

    Raises:
        RuntimeError: the process failed to get ready.
    """

    def __init__(self, function: Callable[..., None], *arguments: object, fork: bool = False) -> None:
        context: BaseContext = multiprocessing.get_context("fork" if fork else "spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        try:
            self.answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: object) -> None:
        """Send a message; :meth:`answer` waits for its answer."""
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
        self.send(question)
        return self.answer()

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let the process end, or kill it if it does not."""
        self._pipe.close()
        self._process.join(_END_LIMIT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _run(pipe: Pipe, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.dup2(2, 1)  # standard output belongs to the measurement, which talks to the runner there
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(pipe, *arguments)
    except EOFError:  # the other end of the pipe is closed
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
