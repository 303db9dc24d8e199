"""Errors that travel to clients elsewhere: their class by name, from a fixed table, and their message."""

from __future__ import annotations

import builtins
from typing import Any

from aioinfer import errors
from aioinfer.errors import InferenceError, ModelError, ServerClosedError, clone_exception, describe

__all__ = ["WireError", "error_of", "pack_error"]

WireError = tuple[str, str, str]
"""The name of a class, a message, and what else is to be known, such as an id to find the error in the server's log."""

_MOST_TEXT = 2**14  # characters

_BUILTINS = (
    *("ArithmeticError", "AssertionError", "AttributeError", "BufferError", "EOFError", "Exception"),
    *("FileNotFoundError", "FloatingPointError", "IndexError", "KeyError", "LookupError", "MemoryError", "NameError"),
    *("NotImplementedError", "OSError", "OverflowError", "PermissionError", "RecursionError", "RuntimeError"),
    *("TimeoutError", "TypeError", "ValueError", "ZeroDivisionError"),
)
"""Of which each makes do with a message."""
_OWN = {name: kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)}
_CLASSES: dict[str, type[Exception]] = {**{name: getattr(builtins, name) for name in _BUILTINS}, **_OWN}


def pack_error(error: BaseException, *, note: str = "") -> WireError:
    """Describe an error that ended a request, so that :func:`error_of` makes another one of it.

    Args:
        error: of any class.
        note: what is to be known beside its message.
    """
    kind = type(error)
    if _CLASSES.get(kind.__name__) is not kind:
        return "", _shorten(describe(error)), _shorten(note)
    text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    return kind.__name__, _shorten(text), _shorten(note)


def _shorten(text: str) -> str:
    """A text that travels: UTF-8 has no lone surrogates."""
    return text[:_MOST_TEXT].encode("utf-8", "backslashreplace").decode()


def error_of(packed: Any) -> Exception:
    """Make the error that a caller gets.

    It has the class and the message of the one at the server, and a note. One that the model raised is a
    :class:`ModelError` which names it, unless its class is one of Python's own.

    Args:
        packed: what :func:`pack_error` returned, at the other end.
    """
    name, text, note = map(str, packed)
    kind = _CLASSES.get(name)
    if kind is None:
        return ModelError(f"{text} ({note})" if note else text)
    error = kind(text)
    if note:
        error.add_note(note)
    if issubclass(kind, InferenceError) and not issubclass(kind, ServerClosedError):
        return error
    return clone_exception(error)
