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
    "INHERIT",
    "MODES",
    "MODES_ARE_OF_THREADS",
    "InteractionType",
    "Mode",
    "attach_mode",
    "caller_mode",
    "detach_mode",
    "interaction_type",
    "mode_code",
    "requests_carry",
    "use_mode",
]


class _Inherit(Enum):
    INHERIT = "whatever is in force where the row is computed"


INHERIT = _Inherit.INHERIT
Mode: TypeAlias = InteractionType | _Inherit | None

caller_mode: Callable[[], Mode]
"""Returns the mode that a request made here and now carries."""

_named: ContextVar[Mode] = ContextVar("aioinfer_interaction_type", default=INHERIT)


@contextmanager
def _naming(mode: Mode) -> Iterator[None]:
    token = _named.set(mode)
    try:
        yield
    finally:
        _named.reset(token)


MODES_ARE_OF_THREADS = "thread_local" in inspect.signature(set_interaction_type).parameters
"""Whether a mode may be in force for one thread alone; else it is one for the whole process."""

if MODES_ARE_OF_THREADS:
    caller_mode = interaction_type

    def use_mode(mode: Mode) -> AbstractContextManager[None]:
        """Put ``mode`` in force for this thread inside a ``with`` block."""
        return nullcontext() if mode is INHERIT else set_interaction_type(mode, thread_local=True)

    def requests_carry(mode: InteractionType | None) -> AbstractContextManager[None]:
        """Make the requests inside a ``with`` block carry ``mode``."""
        return use_mode(mode)
else:
    caller_mode = _named.get

    def use_mode(mode: Mode) -> AbstractContextManager[None]:
        """Put ``mode`` in force inside a ``with`` block, unless it is so already."""
        return nullcontext() if mode is INHERIT or mode is interaction_type() else set_interaction_type(mode)

    def requests_carry(mode: InteractionType | None) -> AbstractContextManager[None]:
        """Make the requests inside a ``with`` block carry ``mode``."""
        return _naming(mode)


MODES: tuple[Mode, ...] = (INHERIT, None, *InteractionType)
"""Every mode; its index is the code by which it travels to other processes."""

_NUMBERS = {mode: number for number, mode in enumerate(MODES)}


def mode_code(mode: Mode) -> int:
    """The index of a mode in ``MODES``."""
    if mode is INHERIT:  # an enum takes long to hash, and mostly it is one of these two
        return 0
    return 1 if mode is None else _NUMBERS[mode]


_MODE_KEY = "_aioinfer_interaction_type"


def attach_mode(td: TensorDictBase, mode: Mode) -> TensorDictBase:
    """Return a shallow copy of a request that carries ``mode`` as an entry, for transports that carry only entries."""
    if mode is INHERIT:
        return td
    tagged = td.copy()
    code = torch.full(td.batch_size, mode_code(mode), dtype=torch.int8, device=td.device or "cpu")
    tagged.set(_MODE_KEY, code)
    return tagged


def detach_mode(td: TensorDictBase) -> tuple[TensorDictBase, Mode]:
    """Split a request into itself and the mode that :func:`attach_mode` gave it."""
    code = td.get(_MODE_KEY, None)
    if code is None:
        return td, INHERIT
    return td.exclude(_MODE_KEY), MODES[int(code.flatten()[0])]
