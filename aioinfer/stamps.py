"""The entry of a reply that says which weights computed it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from sys import getrefcount

import torch
from torch import Tensor

__all__ = ["VersionStamps"]

# Of each size: callers hold the last reply while they wait for the next, and not all are answered by one batch.
_SHEETS = 4

# How many tensors share a storage; without it no sheet is known to be unused.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


class VersionStamps:
    """Makes a tensor for each reply. Model thread only.

    To make 64 tensors and to free them takes 33 us, a tenth of a batch of a small model. So a sheet of stamps is used
    again, unless anybody still has one of them or something that shares its memory, or has written to it;
    to find that out takes 1 us.
    """

    def __init__(self) -> None:
        self._version = 0
        self._sheets: defaultdict[int, deque[_Sheet]] = defaultdict(partial(deque, maxlen=_SHEETS))

    def make(self, version: int, size: torch.Size, device: torch.device | None) -> Sequence[Tensor]:
        """The stamps of a batch ``[B, *size]``: ``B`` integer tensors ``[*size]``, each of its reply's own."""
        count = size[0]
        if len(size) > 1 or device not in (None, _CPU) or _use_count is None:
            return torch.full(size, version, device=device).unbind(0)
        if version != self._version:
            self._version = version
            self._sheets.clear()
        # Sizes are powers of two: callers that keep their replies must not cost many more stamps than they get.
        sheets = self._sheets[places := 1 << (count - 1).bit_length()]
        for sheet in sheets:
            if sheet.is_unused():
                return sheet.stamps[:count]
        sheets.append(_Sheet(version, places))
        return sheets[-1].stamps[:count]


class _Sheet:
    __slots__ = ("_base", "_storage", "_unused", "stamps")

    def __init__(self, version: int, count: int) -> None:
        self._base = torch.full((count,), version)
        self._storage = self._base.untyped_storage()
        self.stamps = self._base.unbind(0)
        self._unused = self._state()

    def is_unused(self) -> bool:
        """Whether nobody else has a stamp, or memory of one, and nobody has written to one."""
        return self._state() == self._unused

    def _state(self) -> tuple[int, int, int, int]:
        assert _use_count is not None
        held, uses = sum(map(getrefcount, self.stamps)), _use_count(self._storage._cdata)
        return self._base._version, held, uses, getrefcount(self._storage)


_CPU = torch.device("cpu")
