"""Loads weights into the model of a worker: checks that they fit, and applies all of them or none."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer.errors import WeightSyncError
from aioinfer.modes import long_lived
from aioinfer.weight_sync.snapshot import copy_tensors
from aioinfer.weight_sync.weights import EXTRA_STATE, Weights, extract_tensors, extract_weights

__all__ = ["StagingBuffers", "WeightLoader"]

_SHOWN = 3  # mismatches in a message

Undo = list[Callable[[], object]]

_Signature: TypeAlias = tuple[tuple[str, str, torch.Size, torch.dtype, torch.device, tuple[int, ...]], ...]
StagingBuffers: TypeAlias = list[tuple[_Signature, dict[str, Tensor]]]
"""Copies of a model's tensors, each with the signature of the tensors that it was allocated for."""


class WeightLoader:
    """Loads weights into the parameters, buffers and extra states of one model.

    The thread that runs the model calls ``load`` and ``copy_aliased``, so no forward pass runs meanwhile. Another
    thread may call ``can_alias`` and ``stage`` during a forward pass.

    Args:
        model: a module, or a TensorDict of weights.
        cast: whether weights of another dtype are converted.

    Attributes:
        loaded: the weights that were loaded last.

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
        self._aliased: list[Tensor] = []  # parameters whose memory belongs to loaded weights
        self.loaded: Weights | None = None

    def load(self, weights: Weights, *, swap: bool = False, cast: bool = False) -> None:
        """Load all of ``weights`` into the model, or none of them if anything is raised.

        A signal handler may raise after the last step. Then ``loaded`` is ``weights``.

        Args:
            weights: the new weights.
            swap: let the parameters alias the memory of ``weights`` instead of copying it. Buffers are always copied.
            cast: convert weights of another dtype in this call.

        Raises:
            WeightSyncError: keys, shapes or dtypes don't fit; the message names the first mismatches.
        """
        targets = self._targets()
        self._check(targets, weights, cast=cast)
        undo: Undo = []
        try:
            if weights.extra_states:
                self._set_extra_states(weights.extra_states, undo)
                targets = self._targets()  # a module may have replaced its tensors
                self._check(targets, weights, cast=cast)
            self._load_tensors(targets, weights, undo, swap=swap)
        except BaseException as error:
            _undo(undo, error)
            raise

    def _load_tensors(self, targets: Mapping[str, Tensor], weights: Weights, undo: Undo, *, swap: bool) -> None:
        read_only = set(map(id, self._aliased))
        in_place: dict[int, tuple[Tensor, Tensor]] = {}  # by target, so that tied parameters are written once
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        aliased: list[Tensor] = []
        for name, tensor in weights.tensors.items():
            target = targets[name]
            if swap and is_aliasable(target, tensor):
                moved[id(target)] = target, tensor
                aliased.append(target)
            elif id(target) in read_only or _overlaps(target):
                moved[id(target)] = target, convert(tensor, target)
            else:
                in_place[id(target)] = target, prepare(tensor, target)
        for target, memory in moved.values():
            undo.append(partial(setattr, target, "data", target.data))
            target.data = memory
        memories, sources = zip(*in_place.values(), strict=True) if in_place else ((), ())
        # One call of C code, in which no signal handler runs: before it everything is undone, after it nothing.
        steps: list[Callable[[], object]] = [partial(torch._foreach_copy_, memories, sources)] if in_place else []
        steps += [undo.clear, partial(self.__dict__.update, loaded=weights, _aliased=aliased)]
        # Inference mode may write to any tensor, and only it to tensors that were made in inference mode.
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            list(map(operator.call, steps))

    def can_alias(self, weights: Weights) -> bool:
        """Whether all parameters can alias the memory of ``weights``: same device, dtype and strides."""
        targets = self._targets()
        pairs = [(targets[name], tensor) for name, tensor in weights.tensors.items() if name in targets]
        return all(is_aliasable(*pair) for pair in pairs if isinstance(pair[0], nn.Parameter))

    def stage(self, weights: Weights, buffers: StagingBuffers) -> Weights:
        """Copy weights into a staging buffer that the parameters don't alias now, for ``load(swap=True)``.

        Args:
            weights: the weights to copy.
            buffers: the staging buffers that later calls use again; one thread at a time owns the list.

        Raises:
            WeightSyncError: the weights don't fit.
        """
        targets = self._targets()
        self._check(targets, weights)
        signature = _signature(targets)
        buffers[:] = [buffer for buffer in buffers if buffer[0] == signature]  # the model may have changed
        loaded: Mapping[str, Tensor] = {} if self.loaded is None else self.loaded.tensors
        free = next((tensors for _, tensors in buffers if not _share_tensors(tensors, loaded)), None)
        if free is None:
            free = _allocate_like(targets)
            buffers.append((signature, free))
        copy_tensors({name: free[name] for name in weights.tensors}, weights.tensors)
        return Weights({name: free[name] for name in weights.tensors}, weights.extra_states)

    @long_lived()
    def copy_aliased(self) -> None:
        """Move the parameters from the memory that ``load(swap=True)`` gave them to memory of their own."""
        aliased, self._aliased = self._aliased, []
        for tensor in aliased:
            tensor.data = tensor.data.clone()

    def _targets(self) -> dict[str, Tensor]:
        try:
            return extract_tensors(self._model)
        except TypeError as error:
            raise WeightSyncError(f"the model can't take weights: {error}") from error

    def _check(self, targets: Mapping[str, Tensor], weights: Weights, *, cast: bool = False) -> None:
        cast = cast or self._cast
        faults = self._mismatches(targets, weights.tensors, cast=cast)
        faults += [f'the model has no "{name}"' for name in weights.extra_states if self._owner_of(name) is None]
        if faults:
            more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise WeightSyncError(f"the weights don't fit the model: {'; '.join(faults[:_SHOWN])}{more}")

    def _mismatches(self, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, cast: bool) -> list[str]:
        faults: list[str] = []
        if targets.keys() != tensors.keys():
            missing = targets.keys() - tensors.keys()
            if missing and isinstance(self._model, nn.Module):
                required = extract_weights(self._model, "state_dict").tensors  # without non-persistent buffers
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
                other = tensors[owner]
                if owner != name and tensor.data_ptr() != other.data_ptr() and not torch.equal(tensor, other):
                    faults.append(f'"{name}" and "{owner}" differ, but are one tensor in the model')
        return faults

    def _owner_of(self, name: str) -> nn.Module | None:
        """The module whose extra state has this name."""
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
                before = copy.deepcopy(module.get_extra_state())  # the module may go on to change the object
            undo.append(partial(module.set_extra_state, before))
            try:
                module.set_extra_state(state)
            except Exception as error:
                raise WeightSyncError(f'the model refused "{name}": {type(error).__qualname__}: {error}') from error


def _undo(steps: Undo, error: BaseException) -> None:
    """Run the steps in reverse order. A step that fails adds a note to ``error``, the reason for the rollback."""
    for step in reversed(steps):
        try:
            step()
        except BaseException as another:
            error.add_note(f"it could not all be undone: {type(another).__qualname__}: {another}")


def _original(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, or else the module itself."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def is_aliasable(target: Tensor, tensor: Tensor) -> bool:
    """Whether ``target`` can take over the memory of ``tensor``: a parameter of the same device, dtype and strides."""
    alike = target.dtype == tensor.dtype and target.device == tensor.device and target.stride() == tensor.stride()
    return alike and isinstance(target, nn.Parameter) and not target.is_inference()


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of the tensor may share memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def prepare(tensor: Tensor, target: Tensor) -> Tensor:
    """Convert ``tensor`` so that copying it to ``target`` allocates no memory, which might fail."""
    if tensor.device == target.device:
        return tensor
    if target.is_contiguous():
        return tensor.to(target.dtype).contiguous()
    return tensor.to(target.device, target.dtype)


@long_lived()
def convert(tensor: Tensor, target: Tensor) -> Tensor:
    """Copy ``tensor`` into new memory that ``target`` can take over."""
    return torch.empty_like(target, requires_grad=False).copy_(tensor)


def _share_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return any(one.get(name) is tensor for name, tensor in other.items())


def _signature(targets: Mapping[str, Tensor]) -> _Signature:
    """Everything that a staging buffer for ``targets`` depends on, including which of them are tied."""
    first: dict[int, str] = {}
    return tuple(
        (name, first.setdefault(id(target), name), target.shape, target.dtype, target.device, target.stride())
        for name, target in targets.items()
    )


@long_lived()
def _allocate_like(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Allocate memory for each target, once for tied ones."""
    made = {id(target): torch.empty_like(target, requires_grad=False) for target in targets.values()}
    return {name: made[id(target)] for name, target in targets.items()}


def _check_ownership(td: TensorDictBase) -> None:
    """Raise :class:`TypeError` if reading the TensorDict makes copies: writing to a copy has no effect."""
    one, other = extract_tensors(td), extract_tensors(td)
    for name, tensor in one.items():
        if tensor.data_ptr() != other[name].data_ptr():
            raise TypeError(
                f'weights can\'t be loaded into "{name}": the TensorDict makes it when it is read, as a lazily '
                "stacked one does; pass one that is contiguous()"
            )
