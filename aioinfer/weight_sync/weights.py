"""Weights by name: read from a module, a TensorDict or a state dict, and given back as one of the latter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "EXTRA_STATE",
    "Strategy",
    "Weights",
    "WeightsLike",
    "as_tensordict",
    "check_strategy",
    "check_version",
    "given_back",
    "read",
    "tensors_of",
]

Strategy: TypeAlias = Literal["tensordict", "state_dict"]
WeightsLike: TypeAlias = nn.Module | TensorDictBase | Mapping[str, Any]

EXTRA_STATE = "_extra_state"
"""How state dicts call what ``nn.Module.get_extra_state`` returns, after the name of its module."""

# torch.compile wraps a module in one that adds this to names; trainer and server need not agree on compiling.
_COMPILED = "_orig_mod."


@dataclass(frozen=True, slots=True)
class Weights:
    """One weight set, without copying it.

    Attributes:
        tensors: by dotted name, as in a state dict.
        extra_states: what modules keep beside tensors, by dotted name; each ends with ``_extra_state``.
    """

    tensors: dict[str, Tensor]
    extra_states: dict[str, Any]

    def detached(self) -> Weights:
        """The same, apart from autograd."""
        return Weights({name: tensor.detach() for name, tensor in self.tensors.items()}, self.extra_states)


def check_strategy(strategy: str) -> None:
    """Raise :class:`ValueError` for anything but the two strategies."""
    if strategy not in ("tensordict", "state_dict"):
        raise ValueError(f'strategy must be "tensordict" or "state_dict", got {strategy!r}')


def check_version(version: int | None) -> None:
    """Raise :class:`TypeError` or :class:`ValueError` for what is no version number."""
    if version is None:
        return
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version must be an integer, got {version!r}")
    if not -(2**63) <= version < 2**63:
        raise ValueError(f"version must fit into 64 bits, got {version}")


def read(source: WeightsLike, strategy: Strategy) -> Weights:
    """Find the weights in ``source``.

    Args:
        source: a module, a TensorDict (nested, or with dotted names), or a state dict.
        strategy: how a module is read: ``"tensordict"`` takes every parameter and buffer, ``"state_dict"``
            what its ``state_dict()`` has, which leaves buffers out that are not persistent. Both take extra state.

    Raises:
        TypeError: ``source`` is none of these, or has entries whose values can't be copied as they are.
    """
    if isinstance(source, TensorDictBase):
        return _weights(_entries_of_tensordict(source))
    if isinstance(source, nn.Module) and strategy == "tensordict":
        parts = list(source.named_modules(remove_duplicate=False))
        return _weights(chain(_tensors_of_parts(parts), _extra_states_of_parts(parts)))
    if isinstance(source, nn.Module):
        return _weights(source.state_dict().items())
    if isinstance(source, Mapping):
        return _weights(source.items())
    raise TypeError(f"weights must be a module, a TensorDict or a state dict, got {type(source).__qualname__}")


def tensors_of(model: nn.Module | TensorDictBase) -> dict[str, Tensor]:
    """Find the tensors of a model as :func:`read` does, without asking it for extra states."""
    if isinstance(model, nn.Module):
        return _weights(_tensors_of_parts(list(model.named_modules(remove_duplicate=False)))).tensors
    return _weights(_entries_of_tensordict(model)).tensors


def _weights(entries: Iterable[tuple[Any, Any]]) -> Weights:
    tensors: dict[str, Tensor] = {}
    extra_states: dict[str, Any] = {}
    for name, value in entries:
        if not isinstance(name, str):
            raise TypeError(f"weights must have names that are strings, got {name!r}")
        name = name.replace(_COMPILED, "")
        if name in tensors or name in extra_states:
            raise TypeError(f'weights must have names of their own, but two are called "{name}"')
        if name == EXTRA_STATE or name.endswith("." + EXTRA_STATE):
            extra_states[name] = value
        elif (obstacle := _obstacle(value)) is not None:
            raise TypeError(f'weights must be dense tensors with values of their own, but "{name}" {obstacle}')
        else:
            tensors[name] = value
    return Weights(tensors, extra_states)


_USUAL = {Tensor, nn.Parameter}


def _obstacle(value: Any) -> str | None:
    """Why the values of an entry can't be copied byte by byte, and the way out; ``None`` if they can."""
    if (
        type(value) in _USUAL
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta or value.is_conj() or value.is_neg())
    ):
        return None
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__qualname__}; leave it out, or make it the extra state of a module"
    if is_lazy(value):
        return "is not initialized yet; run the model once before"
    if value.layout != torch.strided or value.is_nested:
        return f"is of layout {value.layout}; make it dense with to_dense() or to_padded_tensor()"
    if value.is_quantized:
        return "is quantized; dequantize() it, or leave it out"
    if value.is_meta:
        return "is on the meta device and has no values; load them before"
    if value.is_conj():
        return "is a conjugate view; make it a tensor of its own with resolve_conj()"
    if value.is_neg():
        return "is a negative view; make it a tensor of its own with resolve_neg()"
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is of type {type(value).__qualname__}, which is no plain tensor; make it one before"
    return None


Parts: TypeAlias = "list[tuple[str, nn.Module]]"


def _tensors_of_parts(parts: Parts) -> Iterator[tuple[str, Any]]:
    """The parameters and then the buffers of modules, as ``named_parameters`` and ``named_buffers`` find them.

    Duplicates too: a tied parameter has several names, and each must be found by whoever unties it. To find the
    modules once takes a third of the time.
    """
    for members in (attrgetter("_parameters"), attrgetter("_buffers")):
        for prefix, part in parts:
            for name, value in members(part).items():
                if value is not None:
                    yield f"{prefix}.{name}" if prefix else name, value


def _extra_states_of_parts(parts: Parts) -> Iterator[tuple[str, Any]]:
    for name, part in parts:
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE, part.get_extra_state()


def _entries_of_tensordict(td: TensorDictBase) -> Iterator[tuple[str, Any]]:
    for key, value in td.items(include_nested=True, leaves_only=True, is_leaf=is_leaf_nontensor):
        name = key if isinstance(key, str) else ".".join(key)
        yield name, value.data if isinstance(value, NonTensorData) else value


def given_back(weights: Weights, strategy: Strategy) -> TensorDict | dict[str, Any]:
    """Make of weights what the strategy is called after: a nested TensorDict, or a state dict."""
    if strategy == "state_dict":
        return {**weights.tensors, **weights.extra_states}
    return as_tensordict(weights)


def as_tensordict(weights: Weights) -> TensorDict:
    """Make a nested TensorDict of weights; extra states are entries that are no tensors."""
    extra = {name: NonTensorData(state) for name, state in weights.extra_states.items()}
    td: TensorDict = TensorDict({**weights.tensors, **extra}).unflatten_keys(".")
    return td
