"""The entry of a reply that says which weights computed it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from sys import getrefcount

import torch
from torch import Tensor

__all__ = ["VersionStamps"]

_SMALLEST = 64  # stamps of a sheet
_SHEETS = 4  # callers hold the last reply while they wait for the next, and not all are answered by one batch

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
        self._sheets: deque[_Sheet] = deque(maxlen=_SHEETS)

    def make(self, version: int, size: torch.Size, device: torch.device | None) -> Sequence[Tensor]:
        """The stamps of a batch ``[B, *size]``: ``B`` integer tensors ``[*size]``, each of its reply's own."""
        count = size[0]
        if len(size) > 1 or device not in (None, _CPU) or _use_count is None:
            return torch.full(size, version, device=device).unbind(0)
        if version != self._version:
            self._version = version
            self._sheets.clear()
        for sheet in self._sheets:
            if len(sheet.stamps) >= count and sheet.is_unused():
                return sheet.stamps[:count]
        sheet = _Sheet(version, max(_SMALLEST, count))
        self._sheets.append(sheet)
        return sheet.stamps[:count]


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
