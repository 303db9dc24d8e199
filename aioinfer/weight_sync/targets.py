"""The model at the receiving end: whether weights fit it, and how they get into it, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer.errors import WeightSyncError
from aioinfer.weight_sync.snapshots import copy_tensors
from aioinfer.weight_sync.weights import EXTRA_STATE, Weights, read

__all__ = ["ModelTarget"]

_SHOWN = 3  # offending keys in a message


class ModelTarget:
    """The parameters, buffers and extra states of a model, as the place where weights go.

    Whoever runs the model must not run it during ``load``. ``spare`` may be filled beside a forward pass.

    Args:
        model: a module, or a TensorDict of weights.
        cast: whether weights of another dtype are converted.

    Raises:
        TypeError: ``model`` is neither.
    """

    def __init__(self, model: nn.Module | TensorDictBase, *, cast: bool = False) -> None:
        if not isinstance(model, nn.Module | TensorDictBase):
            raise TypeError(f"weights can be loaded into an nn.Module or a TensorDict, not {type(model).__qualname__}")
        self._model = model
        self._cast = cast
        self._spares: list[dict[str, Tensor]] = []
        self._borrowed: list[Tensor] = []  # parameters that have taken over the memory of weights
        self._in_use: Mapping[str, Tensor] = {}

    def load(self, weights: Weights, *, swap: bool = False, cast: bool = False) -> None:
        """Make ``weights`` those of the model: all of them, or none if they don't fit.

        Args:
            weights: what the model is to compute with.
            swap: let the parameters take over the memory of ``weights`` instead of copying it; buffers
                are copied in any case.
            cast: convert another dtype this time.

        Raises:
            WeightSyncError: keys, shapes or dtypes don't fit; the message names the first offending keys.
        """
        targets = read(self._model, "tensordict").tensors
        self._check(targets, weights, cast=cast)
        self._set_extra_states(weights.extra_states)
        lent = set(map(id, self._borrowed))
        in_place: dict[str, Tensor] = {}
        borrowed: list[Tensor] = []
        for name, tensor in weights.tensors.items():
            target = targets[name]
            if swap and _can_take_over(target, tensor):
                target.data = tensor
                borrowed.append(target)
            else:
                if id(target) in lent:  # not to be written to
                    target.data = torch.empty_like(target)
                in_place[name] = target
        self._borrowed, self._in_use = borrowed, weights.tensors
        copy_tensors(in_place, weights.tensors)

    def can_borrow(self, weights: Weights) -> bool:
        """Whether all parameters can take over the memory of ``weights``: same device, dtype and strides."""
        targets = read(self._model, "tensordict").tensors
        pairs = [(targets[name], tensor) for name, tensor in weights.tensors.items() if name in targets]
        return all(_can_take_over(*pair) for pair in pairs if isinstance(pair[0], nn.Parameter))

    def spare(self, weights: Weights) -> Weights:
        """Copy weights into memory of the model's own that its parameters don't use now, for ``load(swap=True)``.

        Raises:
            WeightSyncError: they don't fit.
        """
        targets = read(self._model, "tensordict").tensors
        self._check(targets, weights)
        unused = [spare for spare in self._spares if not _shared(spare, self._in_use)]
        if not unused:
            unused = [_allocate_like(targets)]
            self._spares += unused
        spare = unused[0]
        copy_tensors({name: spare[name] for name in weights.tensors}, weights.tensors)
        return Weights({name: spare[name] for name in weights.tensors}, weights.extra_states)

    def copy_borrowed(self) -> None:
        """Move the parameters out of the memory that the last ``load(swap=True)`` gave them."""
        borrowed, self._borrowed = self._borrowed, []
        for tensor in borrowed:
            tensor.data = tensor.data.clone()

    def _check(self, targets: Mapping[str, Tensor], weights: Weights, *, cast: bool = False) -> None:
        cast = cast or self._cast
        faults = [
            *self._misfits(targets, weights.tensors, cast=cast),
            *self._unknown_extra_states(weights.extra_states),
        ]
        if faults:
            more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise WeightSyncError(f"the weights don't fit the model: {'; '.join(faults[:_SHOWN])}{more}")

    def _misfits(self, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, cast: bool) -> list[str]:
        faults: list[str] = []
        if targets.keys() != tensors.keys():
            missing = targets.keys() - tensors.keys()
            if missing and isinstance(self._model, nn.Module):
                required = read(self._model, "state_dict").tensors  # not the buffers that are not persistent
                missing &= required.keys()
            faults += [f'"{name}" is missing' for name in targets if name in missing]
            faults += [f'the model has no "{name}"' for name in tensors if name not in targets]
        owners: dict[int, str] = {}
        for name, tensor in tensors.items():
            target = targets.get(name)
            if target is None:
                continue
            if tensor.shape != target.shape:
                faults.append(f'"{name}" has shape {list(tensor.shape)}, the model has {list(target.shape)}')
            elif tensor.dtype != target.dtype and not cast:
                faults.append(f'"{name}" has dtype {tensor.dtype}, the model has {target.dtype}')
            else:
                owner = owners.setdefault(id(target), name)
                if owner != name and not _same(tensor, tensors[owner]):
                    faults.append(f'"{name}" and "{owner}" differ, but are one tensor in the model')
        return faults

    def _unknown_extra_states(self, names: Iterable[str]) -> list[str]:
        return [f'the model has no "{name}"' for name in names if self._owner_of(name) is None]

    def _owner_of(self, name: str) -> nn.Module | None:
        """The module whose extra state is called ``name``."""
        if not isinstance(self._model, nn.Module):
            return None
        try:
            module = _original(self._model).get_submodule(name.removesuffix(EXTRA_STATE).removesuffix("."))
        except AttributeError:
            return None
        module = _original(module)
        return module if type(module).set_extra_state is not nn.Module.set_extra_state else None

    def _set_extra_states(self, states: Mapping[str, Any]) -> None:
        """Set all of them, or leave the model as it was: a module may refuse."""
        undo: list[tuple[nn.Module, Any]] = []
        try:
            for name, state in states.items():
                module = self._owner_of(name)
                assert module is not None  # checked before
                undo.append((module, module.get_extra_state()))
                module.set_extra_state(state)
        except Exception as error:
            for module, state in undo:
                module.set_extra_state(state)
            raise WeightSyncError(f'the model refused "{name}": {type(error).__qualname__}: {error}') from error


def _original(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, or else the module itself."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _can_take_over(target: Tensor, tensor: Tensor) -> bool:
    alike = target.dtype == tensor.dtype and target.device == tensor.device and target.stride() == tensor.stride()
    return alike and isinstance(target, nn.Parameter)


def _shared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return any(one.get(name) is tensor for name, tensor in other.items())


def _allocate_like(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Memory for each target; those that are one and the same get one."""
    made = {id(target): torch.empty_like(target, requires_grad=False) for target in targets.values()}
    return {name: made[id(target)] for name, target in targets.items()}
