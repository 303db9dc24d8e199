"""Weights by name: extracted from a module, a TensorDict or a state dict, and converted back to one of the latter."""

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
    "MAX_VERSION",
    "Strategy",
    "Weights",
    "WeightsLike",
    "as_tensordict",
    "check_version",
    "extract_tensors",
    "extract_weights",
    "to_strategy",
]

Strategy: TypeAlias = Literal["tensordict", "state_dict"]
WeightsLike: TypeAlias = nn.Module | TensorDictBase | Mapping[str, Any]

EXTRA_STATE = "_extra_state"
"""The last part of the name under which a state dict has the result of ``nn.Module.get_extra_state``."""

MAX_VERSION = 2**63 - 1
"""The highest version of weights; the lowest is ``-MAX_VERSION - 1``."""

# torch.compile wraps a module, and the wrapper adds this to all names. One of trainer and server may compile alone.
_COMPILED = "_orig_mod."


@dataclass(frozen=True, slots=True)
class Weights:
    """References to one weight set, without a copy.

    Attributes:
        tensors: by dotted name, as in a state dict.
        extra_states: the extra states of modules, by dotted name; each name ends with ``_extra_state``.
    """

    tensors: dict[str, Tensor]
    extra_states: dict[str, Any]

    def detached(self) -> Weights:
        """The same tensors without their autograd history."""
        return Weights({name: tensor.detach() for name, tensor in self.tensors.items()}, self.extra_states)


def check_version(version: int | None) -> None:
    """Raise :class:`TypeError` or :class:`ValueError` if ``version`` is no version number and not ``None``."""
    if version is None:
        return
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"version must be an integer, got {version!r}")
    if not -MAX_VERSION - 1 <= version <= MAX_VERSION:
        raise ValueError(f"version must fit into 64 bits, got {version}")


def extract_weights(source: WeightsLike, strategy: Strategy) -> Weights:
    """Find the weights in ``source``.

    Args:
        source: a module, a TensorDict (nested, or with dotted names), or a state dict.
        strategy: how a module is read: ``"tensordict"`` takes every parameter and buffer, ``"state_dict"``
            its ``state_dict()``, which lacks the buffers that are not persistent. Both take extra states.

    Raises:
        TypeError: ``source`` is none of these, or has entries whose values can't be copied byte by byte.
    """
    if isinstance(source, TensorDictBase):
        return _weights(_tensordict_entries(source))
    if isinstance(source, nn.Module) and strategy == "tensordict":
        modules = _named_modules(source)
        return _weights(chain(_tensors(modules), _extra_states(modules)))
    if isinstance(source, nn.Module):
        return _weights(source.state_dict().items())
    if isinstance(source, Mapping):
        return _weights(source.items())
    raise TypeError(f"weights must be a module, a TensorDict or a state dict, got {type(source).__qualname__}")


def extract_tensors(model: nn.Module | TensorDictBase) -> dict[str, Tensor]:
    """Find the tensors of a model as :func:`extract_weights` does, without calling ``get_extra_state``."""
    entries = _tensors(_named_modules(model)) if isinstance(model, nn.Module) else _tensordict_entries(model)
    return _weights(entries).tensors


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
    """Why an entry can't be copied byte by byte, and how to change it; ``None`` if it can be copied."""
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


def _named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def _tensors(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """The parameters and then the buffers of modules, in the order of ``named_parameters`` and ``named_buffers``.

    Duplicates are included: a receiver whose parameters are not tied needs every name of a tied one. One search for
    the modules takes a third of the time of those two methods.
    """
    for members in (attrgetter("_parameters"), attrgetter("_buffers")):
        for prefix, module in modules:
            for name, value in members(module).items():
                if value is not None:
                    yield f"{prefix}.{name}" if prefix else name, value


def _extra_states(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    for name, module in modules:
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE, module.get_extra_state()


def _tensordict_entries(td: TensorDictBase) -> Iterator[tuple[str, Any]]:
    for key, value in td.items(include_nested=True, leaves_only=True, is_leaf=is_leaf_nontensor):
        name = key if isinstance(key, str) else ".".join(key)
        yield name, value.data if isinstance(value, NonTensorData) else value


def to_strategy(weights: Weights, strategy: Strategy) -> TensorDict | dict[str, Any]:
    """Convert weights to the type that the strategy names: a nested TensorDict, or a state dict."""
    if strategy == "state_dict":
        return {**weights.tensors, **weights.extra_states}
    return as_tensordict(weights)


def as_tensordict(weights: Weights) -> TensorDict:
    """Convert weights to a nested TensorDict; extra states become non-tensor entries."""
    extra = {name: NonTensorData(state) for name, state in weights.extra_states.items()}
    td: TensorDict = TensorDict({**weights.tensors, **extra}).unflatten_keys(".")
    return td
