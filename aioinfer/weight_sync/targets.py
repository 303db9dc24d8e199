"""The model at the receiving end: whether weights fit it, and how they get into it, all of them or none."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer.errors import WeightSyncError
from aioinfer.modes import long_lived
from aioinfer.weight_sync.snapshots import copy_tensors
from aioinfer.weight_sync.weights import EXTRA_STATE, Weights, read, tensors_of

__all__ = ["ModelTarget", "Spares"]

_SHOWN = 3  # offending keys in a message

Undo = list[Callable[[], object]]


_Description: TypeAlias = tuple[tuple[str, str, torch.Size, torch.dtype, torch.device, tuple[int, ...]], ...]
Spares: TypeAlias = list[tuple[_Description, dict[str, Tensor]]]
"""Copies of a model's tensors, each with the layout that it was made for."""


class ModelTarget:
    """The parameters, buffers and extra states of a model, as the place where weights go.

    Whoever runs the model must not run it during ``load``. ``spare`` may be filled beside a forward pass.

    Args:
        model: a module, or a TensorDict of weights.
        cast: whether weights of another dtype are converted.

    Attributes:
        in_use: what was loaded last.

    Raises:
        TypeError: ``model`` is neither, or a TensorDict that has no tensors of its own to write to.
    """

    def __init__(self, model: nn.Module | TensorDictBase, *, cast: bool = False) -> None:
        if not isinstance(model, nn.Module | TensorDictBase):
            raise TypeError(f"weights can be loaded into an nn.Module or a TensorDict, not {type(model).__qualname__}")
        if isinstance(model, TensorDictBase):
            _check_ownership(model)
        self._model = model
        self._cast = cast
        self._borrowed: list[Tensor] = []  # parameters that have taken over the memory of weights
        self.in_use: Weights | None = None

    def load(self, weights: Weights, *, swap: bool = False, cast: bool = False) -> None:
        """Make ``weights`` those of the model: all of them; or none, whatever is raised.

        An exception out of a signal handler may come when the last step is done. Then they are ``in_use``.

        Args:
            weights: what the model is to compute with.
            swap: let the parameters take over the memory of ``weights`` instead of copying it; buffers
                are copied in any case.
            cast: convert another dtype this time.

        Raises:
            WeightSyncError: keys, shapes or dtypes don't fit; the message names the first offending keys.
        """
        targets = self._targets()
        self._check(targets, weights, cast=cast)
        undo: Undo = []
        try:
            if weights.extra_states:
                self._set_extra_states(weights.extra_states, undo)
                targets = self._targets()  # a module may have made its tensors anew
                self._check(targets, weights, cast=cast)
            self._load_tensors(targets, weights, undo, swap=swap)
        except BaseException as error:
            _undo(undo, error)
            raise

    def _load_tensors(self, targets: Mapping[str, Tensor], weights: Weights, undo: Undo, *, swap: bool) -> None:
        lent = set(map(id, self._borrowed))
        in_place: dict[int, tuple[Tensor, Tensor]] = {}  # by target; those that are one and the same are written once
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        borrowed: list[Tensor] = []
        for name, tensor in weights.tensors.items():
            target = targets[name]
            if swap and _can_take_over(target, tensor):
                moved[id(target)] = target, tensor
                borrowed.append(target)
            elif id(target) in lent or _overlaps(target):  # not to be written to
                moved[id(target)] = target, _converted(tensor, target)
            else:
                in_place[id(target)] = target, _staged(tensor, target)
        for target, memory in moved.values():
            undo.append(partial(setattr, target, "data", target.data))
            target.data = memory
        memories, sources = zip(*in_place.values(), strict=True) if in_place else ((), ())
        # One call of C code, in which no signal handler runs: before it all is undone, after it nothing.
        steps: list[Callable[[], object]] = [partial(torch._foreach_copy_, memories, sources)] if in_place else []
        steps += [undo.clear, partial(self.__dict__.update, in_use=weights, _borrowed=borrowed)]
        # Tensors that were made in inference mode may be written to there only; all others may too.
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            list(map(operator.call, steps))

    def can_borrow(self, weights: Weights) -> bool:
        """Whether all parameters can take over the memory of ``weights``: same device, dtype and strides."""
        targets = self._targets()
        pairs = [(targets[name], tensor) for name, tensor in weights.tensors.items() if name in targets]
        return all(_can_take_over(*pair) for pair in pairs if isinstance(pair[0], nn.Parameter))

    def spare(self, weights: Weights, spares: Spares) -> Weights:
        """Copy weights into memory of the model's own that its parameters don't use now, for ``load(swap=True)``.

        Args:
            weights: what to copy.
            spares: where such memory is kept for the next time, by one thread at a time.

        Raises:
            WeightSyncError: they don't fit.
        """
        targets = self._targets()
        self._check(targets, weights)
        description = _describe(targets)
        spares[:] = [spare for spare in spares if spare[0] == description]  # the model may have changed
        in_use: Mapping[str, Tensor] = {} if self.in_use is None else self.in_use.tensors
        spare = next((tensors for _, tensors in spares if not _shared(tensors, in_use)), None)
        if spare is None:
            spare = _allocate_like(targets)
            spares.append((description, spare))
        copy_tensors({name: spare[name] for name in weights.tensors}, weights.tensors)
        return Weights({name: spare[name] for name in weights.tensors}, weights.extra_states)

    @long_lived()
    def copy_borrowed(self) -> None:
        """Move the parameters out of the memory that the last ``load(swap=True)`` gave them."""
        borrowed, self._borrowed = self._borrowed, []
        for tensor in borrowed:
            tensor.data = tensor.data.clone()

    def _targets(self) -> dict[str, Tensor]:
        try:
            return tensors_of(self._model)
        except TypeError as error:
            raise WeightSyncError(f"the model can't take weights: {error}") from error

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
            elif target.is_inference() and _overlaps(target):
                faults.append(
                    f'"{name}" can\'t be written: its elements share memory, and it was made in inference mode'
                )
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

    def _set_extra_states(self, states: Mapping[str, Any], undo: Undo) -> None:
        for name, state in states.items():
            module = self._owner_of(name)
            assert module is not None  # checked before
            with long_lived():
                before = copy.deepcopy(module.get_extra_state())  # it may go on to change what it has returned
            undo.append(partial(module.set_extra_state, before))
            try:
                module.set_extra_state(state)
            except Exception as error:
                raise WeightSyncError(f'the model refused "{name}": {type(error).__qualname__}: {error}') from error


def _undo(steps: Undo, error: BaseException) -> None:
    """Take all steps, the last one first; those that fail are noted at ``error``, for which they are taken."""
    for step in reversed(steps):
        try:
            step()
        except BaseException as another:
            error.add_note(f"it could not all be undone: {type(another).__qualname__}: {another}")


def _original(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, or else the module itself."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _can_take_over(target: Tensor, tensor: Tensor) -> bool:
    alike = target.dtype == tensor.dtype and target.device == tensor.device and target.stride() == tensor.stride()
    return alike and isinstance(target, nn.Parameter) and not target.is_inference()


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _staged(tensor: Tensor, target: Tensor) -> Tensor:
    """What can be copied to ``target`` without taking memory, which might fail."""
    if tensor.device == target.device:
        return tensor
    if target.is_contiguous():
        return tensor.to(target.dtype).contiguous()
    return tensor.to(target.device, target.dtype)


@long_lived()
def _converted(tensor: Tensor, target: Tensor) -> Tensor:
    """A copy of ``tensor`` that may be the memory of ``target``."""
    return torch.empty_like(target, requires_grad=False).copy_(tensor)


def _shared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return any(one.get(name) is tensor for name, tensor in other.items())


def _describe(targets: Mapping[str, Tensor]) -> _Description:
    """All that memory for ``targets`` depends on: which of them are one and the same, too."""
    first: dict[int, str] = {}
    return tuple(
        (name, first.setdefault(id(target), name), target.shape, target.dtype, target.device, target.stride())
        for name, target in targets.items()
    )


@long_lived()
def _allocate_like(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Memory for each target; those that are one and the same get one."""
    made = {id(target): torch.empty_like(target, requires_grad=False) for target in targets.values()}
    return {name: made[id(target)] for name, target in targets.items()}


def _check_ownership(td: TensorDictBase) -> None:
    """Raise :class:`TypeError` if reading makes copies, which can be written to without any effect."""
    one, other = tensors_of(td), tensors_of(td)
    for name, tensor in one.items():
        if tensor.data_ptr() != other[name].data_ptr():
            raise TypeError(
                f'weights can\'t be loaded into "{name}": it is no tensor of the TensorDict, but made when it is read, '
                "as in a lazily stacked one; pass one that is contiguous()"
            )
