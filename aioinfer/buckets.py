"""Batches of few sizes: each is padded to its bucket, so that code that is made for one size serves them all."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.errors import InvalidRequestError
from aioinfer.modes import long_lived
from aioinfer.plan import Runner
from aioinfer.tensors import build, check_output, entries, is_nested

__all__ = ["BatchLayout", "PaddedRunner", "find_bucket", "make_bucket_sizes", "take_rows"]

# So many indices are kept, each of them of one batch size, its bucket and a device; they have up to 8 KiB each.
_KEPT_INDICES = 1024


def make_bucket_sizes(max_batch_size: int, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """The batch sizes that are computed.

    Args:
        max_batch_size: most rows in one batch.
        sizes: in ascending order; ``None``: the powers of two below ``max_batch_size``, and that itself.

    Raises:
        TypeError: ``sizes`` is no sequence of integers.
        ValueError: they are not in ascending order, one is below 1, or the largest is below ``max_batch_size``.
    """
    if sizes is None:
        return *[1 << power for power in range((max_batch_size - 1).bit_length())], max_batch_size
    if not isinstance(sizes, Sequence) or any(not isinstance(size, int) or isinstance(size, bool) for size in sizes):
        raise TypeError(f"bucket_sizes must be a sequence of integers, got {sizes!r}")
    if not sizes or sizes[0] < 1 or any(size >= later for size, later in pairwise(sizes)):
        raise ValueError(f"bucket_sizes must be at least 1 each, in ascending order, none twice; got {list(sizes)}")
    if sizes[-1] < max_batch_size:
        raise ValueError(
            f"the largest of bucket_sizes, {sizes[-1]}, must be at least max_batch_size, which is {max_batch_size}"
        )
    return tuple(sizes)


class BatchLayout:
    """The entries of a batch, which it brings into one order, since compiled code depends on that.

    Args:
        batch: ``[B, *size]``.
        device: that arranged batches name.

    Raises:
        ValueError: an entry is not a plain tensor, or a TensorDict of such.
    """

    def __init__(self, batch: TensorDictBase, device: torch.device | None) -> None:
        self._size = batch.batch_size[1:]
        self._device = device
        self._nested: dict[str, BatchLayout | None] = {}
        for name, value in batch.items():
            if is_nested(value):
                self._nested[name] = BatchLayout(value, device)
            elif isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
                self._nested[name] = None
            else:
                raise ValueError(
                    f'"{name}" is a {type(value).__qualname__}, and batches that are padded to bucket sizes, as '
                    "compile and cuda_graphs need it, have entries that are plain tensors"
                )

    def arrange(self, batch: TensorDictBase, rows: int, change: Callable[[Tensor], Tensor] | None = None) -> TensorDict:
        """The entries of a batch, in the order of this layout.

        Args:
            batch: ``[B, *size]``.
            rows: of the result.
            change: makes an entry of the result, ``[rows, ...]``; ``None``: it is the batch's own.

        Raises:
            InvalidRequestError: its entries are not those of this layout.
        """
        found = entries(batch)
        source: dict[str, Any] = {}
        try:
            for name, nested in self._nested.items():
                value = found[name]
                if nested is not None:
                    source[name] = nested.arrange(value, rows, change)
                else:
                    source[name] = value if change is None else change(value)
        except (KeyError, AttributeError):
            source.clear()
        if len(source) != len(found) or (self._nested and not source):
            raise InvalidRequestError(f"a batch has entries {sorted(found)}, expected {sorted(self._nested)}")
        return build(source, torch.Size((rows, *self._size)), self._device)


class PaddedRunner:
    """Pads each batch to its bucket by repeating its first row, and takes what was computed for these rows off again.

    The layout of the first batch is that of all. One thread at a time uses it.

    Args:
        run: what is called, with batches of the bucket sizes only.
        sizes: of the buckets, in ascending order.
    """

    def __init__(self, run: Runner, sizes: Sequence[int]) -> None:
        self._run = run
        self._sizes = sizes
        self._layout: BatchLayout | None = None

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Compute ``[B, ...]`` from ``[B, ...]``.

        Raises:
            ValueError: the batch has more rows than the largest bucket.
            InvalidRequestError: its entries are not those of the first batch.
        """
        if self._layout is None:
            self._layout = BatchLayout(batch, batch.device)
        count = batch.batch_size[0]
        size = find_bucket(self._sizes, count)
        if size == count:
            return self._run(self._layout.arrange(batch, count, Tensor.contiguous))
        output = self._run(self._layout.arrange(batch, size, lambda leaf: pad(leaf, size)))
        return take_rows(check_output(output, size), count)


def find_bucket(sizes: Sequence[int], count: int) -> int:
    """The smallest of the sizes, which are in ascending order, that so many rows fit into."""
    place = bisect_left(sizes, count)
    if place == len(sizes):
        raise ValueError(f"a batch has {count} rows, more than the largest bucket, which has {sizes[-1]}")
    return sizes[place]


def pad(leaf: Tensor, size: int) -> Tensor:
    """A copy of a tensor ``[B, ...]``, with its first row repeated up to ``[size, ...]``."""
    return leaf.index_select(0, _padded_index(leaf.shape[0], size, leaf.device))


@lru_cache(_KEPT_INDICES)
def _padded_index(count: int, size: int, device: torch.device) -> Tensor:
    with long_lived():
        return torch.tensor([*range(count), *[0] * (size - count)], dtype=torch.int64, device=device)


def take_rows(output: TensorDictBase, count: int) -> TensorDictBase:
    """The first rows of an output ``[B, *size]``, as views."""
    if type(output) is not TensorDict:
        first: TensorDictBase = output[:count]
        return first
    source = {
        name: take_rows(value, count) if is_nested(value) else value[:count] for name, value in entries(output).items()
    }
    return build(source, torch.Size((count, *output.batch_size[1:])), output.device)
