"""Requests by name: what a caller may give as an entry, and the tensors that the entries of a batch make.

An array stays an array until its batch is stacked: one call then makes a tensor of all rows, for less than it takes to
make a tensor of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np  # tensordict requires it
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aioinfer.errors import InvalidRequestError
from aioinfer.tensors import Allocate, UnlikeRequestsError, build, is_nested, join_by_name, show_key, stack_column
from aioinfer.tensors import entries as entries_of

__all__ = [
    "Entries",
    "RequestLike",
    "array_dtype",
    "as_array",
    "check_entries",
    "is_checked",
    "make_request",
    "make_td",
    "row_count",
    "stack_entries",
    "to_tensor",
]

Entries: TypeAlias = dict[str, Any]
"""Tensors, arrays of a dtype that tensors have, and TensorDicts, by name."""

RequestLike: TypeAlias = TensorDictBase | Mapping[str, Any]
"""What clients take as a request."""

_DTYPES = {np.dtype(kind) for kind in "?bBhHiIlLqQefdFD"}
"""Of arrays that a tensor can have the memory of, in this machine's byte order."""
_ARRAY = {np.ndarray}
_dtype = attrgetter("dtype")
_TORCH_DTYPES = {dtype: torch.from_numpy(np.empty(0, dtype)).dtype for dtype in _DTYPES}
_ARRAY_DTYPES = {kind: dtype for dtype, kind in _TORCH_DTYPES.items()}


def make_request(td: RequestLike | None, entries: Entries) -> TensorDictBase | Entries:
    """What a client was called with: a TensorDict as it is, the entries of a mapping, or those given by name.

    Args:
        td: what is asked; ``None``: what the entries say.
        entries: that were given by name, of which there must be none beside ``td``.

    Raises:
        TypeError: a request and entries by name.
        InvalidRequestError: a name is no string.
    """
    if td is None:
        return entries
    if entries:
        raise TypeError(f"expected a request or entries by name, got both: {', '.join(entries)}")
    if not isinstance(td, Mapping) or isinstance(td, TensorDictBase):
        return td
    if unnamed := [name for name in td if not isinstance(name, str)]:
        raise InvalidRequestError(f"the names of entries are strings, got {unnamed[0]!r}")
    return dict(td)


def is_checked(entries: Entries) -> bool:
    """Whether there are entries, and each is a tensor, or an array of a dtype that tensors have."""
    for value in entries.values():
        kind = type(value)
        if kind is not Tensor and (kind is not np.ndarray or value.dtype not in _DTYPES):
            return False
    return bool(entries)


def check_entries(
    entries: Entries, dtypes: Mapping[NestedKey, torch.dtype] | None = {}, above: tuple[str, ...] = ()
) -> None:
    """Replace each entry that is neither tensor nor array by the tensor that it makes.

    Args:
        entries: of a request.
        dtypes: of the tensors that numbers make, by key; others get the dtype that ``torch.tensor`` gives them.
            ``None``: they are known elsewhere, so numbers, and mappings, are only checked and stay what they are.
        above: the key of the entry in which these lie.

    Raises:
        InvalidRequestError: one can't be a tensor; the message names it. Or there is none.
    """
    if not entries:
        raise InvalidRequestError("expected a request: a TensorDict, a mapping, or entries by name (observation=...)")
    if not is_checked(entries):
        entries |= {name: _converted((*above, name), value, dtypes) for name, value in entries.items()}


def _converted(path: tuple[str, ...], value: Any, dtypes: Mapping[NestedKey, torch.dtype] | None) -> Any:
    if isinstance(value, Tensor | TensorDictBase):
        return value
    key: NestedKey = path[0] if len(path) == 1 else path
    if isinstance(value, Mapping):
        inner = dict(make_request(value, {}))
        check_entries(inner, dtypes, path)
        return inner if dtypes is None else make_td(inner, torch.Size([]))
    try:
        array = np.asarray(value)
        if array.dtype.newbyteorder("=") not in _DTYPES:
            reason = f"an array of dtype {array.dtype}"
        elif np.ma.is_masked(value):
            reason = "it has masked elements"
        elif hasattr(value, "__array__"):
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        else:
            tensor = torch.tensor(value, device="cpu")
            if dtypes is None:
                return value
            dtype = dtypes.get(key, tensor.dtype)
            made = tensor if dtype is tensor.dtype else torch.tensor(value, dtype=dtype, device="cpu")
            if torch.can_cast(tensor.dtype, dtype) or torch.equal(made.to(tensor.dtype), tensor):
                return made
            reason = f"another value as {dtype}"
    except Exception as error:  # whatever the value's own methods raise
        reason = f"{type(error).__qualname__}: {error}"
    raise InvalidRequestError(f"{show_key(key)} can't be a tensor, got {type(value).__qualname__} ({reason})")


def array_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The dtype of arrays that have the elements of such a tensor; ``None`` if there is none."""
    return _ARRAY_DTYPES.get(dtype)


def as_array(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """An array that shares the memory of a tensor; ``None`` if there is none of its dtype."""
    return tensor.numpy() if tensor.dtype in _ARRAY_DTYPES else None


def to_tensor(value: Any) -> Any:
    """The tensor of a checked entry. It shares the memory of an array that may be written to."""
    if type(value) is not np.ndarray:
        return value
    if value.flags.writeable:
        try:
            return torch.from_numpy(value)
        except ValueError:  # tensors have no such strides
            pass
    return torch.from_numpy(value.copy())


def make_td(entries: Entries, batch_size: torch.Size) -> TensorDict:
    """Make a TensorDict of checked entries. TensorDicts among them get its batch size, unless theirs begins with it."""
    return build({name: _fitted(value, batch_size) for name, value in entries.items()}, batch_size, None)


def _fitted(value: Any, size: torch.Size) -> Any:
    if type(value) is np.ndarray or not is_nested(value):
        return to_tensor(value)
    if value.batch_size[: len(size)] == size:
        return value
    return build({name: _fitted(inner, size) for name, inner in entries_of(value).items()}, size, value.device)


def row_count(entries: Entries, shapes: Mapping[NestedKey, torch.Size]) -> int | None:
    """How many rows checked entries have; ``None``: they have no dimension for rows.

    Args:
        entries: of a request.
        shapes: the shapes of the tensors of one row; the first of them that the entries have tells.
    """
    for key, shape in shapes.items():
        value: Any = entries
        for name in (key,) if isinstance(key, str) else key:
            value = value.get(name) if isinstance(value, dict | TensorDictBase) else None
        if (found := getattr(value, "shape", None)) is not None:
            return found[0] if len(found) == len(shape) + 1 else None
    return None


def stack_entries(rows: Sequence[Entries], size: torch.Size, allocate: Allocate | None = None) -> TensorDict:
    """Stack checked entries of rows ``[*size]`` along a new first dimension.

    Args:
        rows: at least one, with like names in any order.
        size: the batch size of a row.
        allocate: makes the memory for a CPU leaf, given its stacked shape and dtype.

    Raises:
        UnlikeRequestsError: they differ in names, shapes of arrays or dtypes.
        RuntimeError: they differ in shapes of tensors, or devices.
    """
    source = join_by_name(rows, partial(_stack, allocate=allocate))
    return build(source, torch.Size((len(rows), *size)), None)


def _stack(values: list[Any], allocate: Allocate | None) -> Any:
    kinds = set(map(type, values))
    if kinds != _ARRAY:
        return stack_column(list(map(to_tensor, values)) if np.ndarray in kinds else values, allocate)
    if len(set(map(_dtype, values))) != 1:  # numpy would promote them
        raise UnlikeRequestsError
    try:
        if allocate is None:
            return torch.from_numpy(np.array(values))
        memory = allocate((len(values), *values[0].shape), _TORCH_DTYPES[values[0].dtype])
        np.stack(values, out=memory.numpy())
    except ValueError:  # their shapes are unlike
        raise UnlikeRequestsError from None
    return memory
