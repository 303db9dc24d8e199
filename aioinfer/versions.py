"""The entry of a reply that has the version of the weights which computed it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from sys import getrefcount

import torch
from torch import Tensor

from aioinfer.modes import long_lived
from aioinfer.tensors import unbind_rows

__all__ = ["VersionTensorCache"]

# Of each size: callers hold the last reply while they wait for the next, and not all are answered by one batch.
_BLOCKS = 4

# How many tensors share a storage; without this function no block is known to be unused.
_storage_uses = getattr(torch._C, "_storage_Use_Count", None)
# How many hold a tensor, those that have imported it by DLPack too.
_tensor_uses = getattr(Tensor, "_use_count", None)


class VersionTensorCache:
    """Makes a version tensor for each reply. One thread at a time uses it.

    To make 64 tensors and to free them takes 23 us, a tenth of a batch of a small model. So a block of tensors is used
    again, unless a caller still has one of them or a tensor that shares its memory, or has written to it: refcounts
    and a comparison tell, in 4 us.
    """

    def __init__(self) -> None:
        self._version = 0
        self._blocks: defaultdict[int, deque[_Block]] = defaultdict(partial(deque, maxlen=_BLOCKS))

    def make(self, version: int, size: torch.Size, device: torch.device | None) -> Sequence[Tensor]:
        """The version tensors of a batch ``[B, *size]``: ``B`` integer tensors ``[*size]``, one for each reply."""
        count = size[0]
        if len(size) > 1 or device not in (None, _CPU) or _storage_uses is None or _tensor_uses is None:
            return unbind_rows(torch.full(size, version, dtype=torch.int64, device=device or _CPU))
        if version != self._version:
            self._version = version
            self._blocks.clear()
        # Sizes are powers of two: callers that keep their replies must not cost many more tensors than they get.
        blocks = self._blocks[places := 1 << (count - 1).bit_length()]
        for block in blocks:
            if block.is_unused():
                return block.tensors[:count]
        blocks.append(_Block(version, places))
        return blocks[-1].tensors[:count]


class _Block:
    __slots__ = ("_base", "_storage", "_unused", "_values", "tensors")

    @long_lived()
    def __init__(self, version: int, count: int) -> None:
        self._values = torch.full((count,), version, dtype=torch.int64)
        self._base = self._values.clone()
        self._storage = self._base.untyped_storage()
        self.tensors = tuple(unbind_rows(self._base))
        self._unused = self._uses()

    def is_unused(self) -> bool:
        """Whether no caller has one of the tensors, or memory of one, or has written to one."""
        return self._uses() == self._unused and torch.equal(self._base, self._values)

    def _uses(self) -> tuple[int, int, int, int]:
        assert _storage_uses is not None
        assert _tensor_uses is not None
        references, uses = sum(map(getrefcount, self.tensors)), sum(map(_tensor_uses, self.tensors))
        return references, uses, _storage_uses(self._storage._cdata), getrefcount(self._storage)


_CPU = torch.device("cpu")
