"""The error tree of aioinfer, and how one model error becomes an error of its own for each caller."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import CancelledError

__all__ = [
    "AccessDeniedError",
    "ClientBusyError",
    "ClientClosedError",
    "CollectorError",
    "DeadlineExceededError",
    "InferenceError",
    "InvalidRequestError",
    "ModelError",
    "NoFreeSlotError",
    "PeerDiedError",
    "ServerClosedError",
    "ServerNotRunningError",
    "ServerOverloadedError",
    "ServerPausedError",
    "ServerStartError",
    "SupersededError",
    "WeightSyncError",
    "clone_exception",
    "describe",
]


class InferenceError(Exception):
    """Base class of every error that aioinfer raises itself."""


class ServerNotRunningError(InferenceError, RuntimeError):
    """The call needs a running server, and this one was not started, or has ended."""


class ServerClosedError(InferenceError, RuntimeError):
    """The server is shut down, or its worker died; the request was not answered."""


class ServerOverloadedError(InferenceError):
    """The queue of pending requests is full (``max_pending``); the request was refused at once."""


class ServerPausedError(InferenceError):
    """The server is paused and refuses requests (``paused(pending="reject")``); it takes them again soon."""


class ServerStartError(InferenceError, RuntimeError):
    """A server in a process of its own did not start; the message has that process's traceback, or how it ended.

    What was raised there is the ``__cause__``, where it can be had in this process.
    """


class PeerDiedError(InferenceError, RuntimeError):
    """The process at the other end of a transport is gone."""


class AccessDeniedError(InferenceError, PermissionError):
    """The server does not take this caller: it needs a token, or another one, or to be asked by another name."""


class NoFreeSlotError(InferenceError, RuntimeError):
    """Every slot of the transport is taken; close a client, or make a transport with more slots."""


class ClientBusyError(InferenceError, RuntimeError):
    """The client has a request under way, and serves one caller at a time; make a client for each caller."""


class ClientClosedError(InferenceError, RuntimeError):
    """The client was closed (``client.close()``); make another one."""


class InvalidRequestError(InferenceError, ValueError):
    """The request can't be served: no TensorDict, or not of the layout that this server takes."""


class DeadlineExceededError(InferenceError, TimeoutError):
    """The request was not answered before its deadline. If it was still pending, it was not computed."""


class SupersededError(InferenceError):
    """A newer request of the same session has taken the place of this one, which was not answered."""


class ModelError(InferenceError):
    """The model returned something that can't be handed out, or raised what no caller can be given as it is.

    The latter are exceptions that would end the caller's thread or event loop instead of reaching
    its ``except`` clause (``SystemExit``, ``KeyboardInterrupt``, ``CancelledError``,
    ``StopIteration``), and exceptions that can't be copied. The original is the ``__cause__``.
    """


class WeightSyncError(InferenceError):
    """A weight update was refused, or did not arrive.

    Attributes:
        failures: to the sender, for each worker that does not use the weights, by index, why not.
    """

    def __init__(self, message: str = "", *, failures: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class CollectorError(InferenceError, RuntimeError):
    """Too few environments are left: the others failed more often than they may be restarted.

    Attributes:
        causes: for each environment that is gone, by number, what it failed with last.
    """

    def __init__(self, message: str = "", *, causes: Mapping[int, BaseException] | None = None) -> None:
        super().__init__(message)
        self.causes = dict(causes or {})


def clone_exception(original: BaseException) -> Exception:
    """Make the instance of an error that one caller gets.

    Callers must not share an exception object: each ``raise`` writes its traceback into it.

    Args:
        original: what the model, or the code around it, raised.

    Returns:
        A new exception of the same type and message where that is possible, else a
        :class:`ModelError` that names it. Its ``__cause__`` is ``original``, or what caused the server to close.
    """
    twin = _clone(original)
    if twin is None:
        twin = ModelError(describe(original))
    twin.__cause__ = original.__cause__ if isinstance(original, ServerClosedError) else original
    return twin


def describe(error: BaseException) -> str:
    """The class and the message of an error in one text."""
    try:
        text = str(error)
    except BaseException:  # a class of the user's may raise anything here
        text = "(its message can't be shown)"
    return f"{type(error).__qualname__}: {text}"


def _clone(original: BaseException) -> Exception | None:
    if not isinstance(original, Exception) or isinstance(original, (StopIteration, StopAsyncIteration, CancelledError)):
        return None
    for make in (copy.copy, _without_init):
        try:
            twin = make(original)
            if type(twin) is type(original) and twin is not original and str(twin) == str(original):
                if hasattr(original, "__notes__"):
                    twin.__notes__ = list(original.__notes__)
                return twin
        except BaseException:  # a class of the user's may raise anything here
            continue
    return None


def _without_init(original: Exception) -> Exception:
    """Copy an exception whose ``__init__`` takes other arguments than it stores in ``args``."""
    kind = type(original)
    twin = kind.__new__(kind, *original.args)
    twin.args = original.args
    twin.__dict__.update(original.__dict__)
    return twin
