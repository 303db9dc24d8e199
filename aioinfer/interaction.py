"""Exploration modes: the one in force where a request is made goes with it to where its row is computed.

From tensordict 0.15 on a mode can belong to a thread, and every client reads the mode in force around
it. Before, modes are process-wide: there only :class:`~aioinfer.PolicyClientModule` names one, other requests are
computed under whatever is in force by then, and threads that read the mode during a forward pass see that pass's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from enum import Enum
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn.probabilistic import InteractionType, interaction_type, set_interaction_type

__all__ = [
    "AMBIENT",
    "MODES",
    "InteractionType",
    "Mode",
    "caller_mode",
    "calling_in",
    "in_force",
    "interaction_type",
    "number_of",
    "stamp",
    "unstamp",
]


class _Ambient(Enum):
    AMBIENT = "whatever is in force where the row is computed"


AMBIENT = _Ambient.AMBIENT
Mode: TypeAlias = InteractionType | _Ambient | None

caller_mode: Callable[[], Mode]
"""Returns the mode that a request made here and now carries."""

_named: ContextVar[Mode] = ContextVar("aioinfer_interaction_type", default=AMBIENT)


@contextmanager
def _naming(mode: Mode) -> Iterator[None]:
    token = _named.set(mode)
    try:
        yield
    finally:
        _named.reset(token)


if "thread_local" in inspect.signature(set_interaction_type).parameters:
    caller_mode = interaction_type

    def in_force(mode: Mode) -> AbstractContextManager[None]:
        """Put ``mode`` in force for this thread inside a ``with`` block."""
        return nullcontext() if mode is AMBIENT else set_interaction_type(mode, thread_local=True)

    def calling_in(mode: InteractionType | None) -> AbstractContextManager[None]:
        """Make the requests inside a ``with`` block carry ``mode``."""
        return in_force(mode)
else:
    caller_mode = _named.get

    def in_force(mode: Mode) -> AbstractContextManager[None]:
        """Put ``mode`` in force inside a ``with`` block, unless it is so already."""
        return nullcontext() if mode is AMBIENT or mode is interaction_type() else set_interaction_type(mode)

    def calling_in(mode: InteractionType | None) -> AbstractContextManager[None]:
        """Make the requests inside a ``with`` block carry ``mode``."""
        return _naming(mode)


MODES: tuple[Mode, ...] = (AMBIENT, None, *InteractionType)
"""Every mode; its place is the number by which it travels to other processes."""

_NUMBERS = {mode: number for number, mode in enumerate(MODES)}


def number_of(mode: Mode) -> int:
    """The place of a mode in ``MODES``."""
    if mode is AMBIENT:  # an enum takes long to hash, and mostly it is one of these two
        return 0
    return 1 if mode is None else _NUMBERS[mode]


_STAMP = "_aioinfer_interaction_type"


def stamp(td: TensorDictBase, mode: Mode) -> TensorDictBase:
    """Return a shallow copy of a request that carries ``mode`` as an entry, for transports that carry only entries."""
    if mode is AMBIENT:
        return td
    stamped = td.copy()
    code = torch.full(td.batch_size, number_of(mode), dtype=torch.int8, device=td.device or "cpu")
    stamped.set(_STAMP, code)
    return stamped


def unstamp(td: TensorDictBase) -> tuple[TensorDictBase, Mode]:
    """Split a request into itself and the mode that :func:`stamp` gave it."""
    code = td.get(_STAMP, None)
    if code is None:
        return td, AMBIENT
    return td.exclude(_STAMP), MODES[int(code.flatten()[0])]
