"""Plans: the functions that a policy is made of, called in order on the entries of a batch.

To call a TensorDict module costs 60 us more than to call the module inside (tensordict 0.14; 7 us with 0.15): it looks
at its arguments and at modes, and sets one entry after another. A plan looks once, when it is made, and a pass then
costs 3 us more than the functions. At each pass it looks whether the policy is still as it was; if not, the
policy is called as it is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
    skip_existing,
)
from tensordict.nn.probabilistic import set_interaction_type
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from aioinfer.errors import InvalidRequestError, ModelError, describe
from aioinfer.interaction_type import interaction_type
from aioinfer.tensors import build, entries, is_nested, show_key

__all__ = ["CheckedPlan", "Plan", "Runner", "make_runner", "plan_function", "plan_policy"]

_log = logging.getLogger("aioinfer")

Runner: TypeAlias = Callable[[TensorDictBase], TensorDictBase]
"""Turns a batch ``[B, *size]`` into an output ``[B, ...]``: a model, or what stands for one."""

Function: TypeAlias = Callable[..., Any]
Compile: TypeAlias = Callable[[Function], Function]
Values: TypeAlias = dict[Any, Any]

_IGNORED = "_"  # the out_key of what is not kept

# Of how many layouts the first batch is compared. A plan that was right so often is believed, so that requests whose
# layouts never repeat are not all computed twice.
_MOST_LAYOUTS = 64

# How often a comparison may fail whose cause may be another thread that draws from the same generator, or what a policy
# does only the first time that it is called.
_MOST_DOUBTS = 3


class _Step(Protocol):
    def __call__(self, values: Values, size: torch.Size, device: torch.device | None) -> str | None:
        """Change the entries of a batch as the step of the policy does.

        Returns:
            ``None``; or why the plan is not for this batch, in which case ``values`` are no use any more.
        """
        ...


class _TensorStep:
    """Calls a function of tensors.

    Args:
        function: what is called.
        in_keys: the entries that it is called with.
        out_keys: the entries that it returns.
        takes_subclasses: whether entries may be of subclasses of ``Tensor``.
    """

    def __init__(
        self,
        function: Function,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        *,
        takes_subclasses: bool = False,
    ) -> None:
        self.function = function
        self.takes_subclasses = takes_subclasses
        self.in_keys = tuple(in_keys)
        self.out_keys = tuple(out_keys)
        self._is_flat = all(isinstance(key, str) for key in (*in_keys, *out_keys))

    def __call__(self, values: Values, size: torch.Size, device: torch.device | None) -> str | None:
        read = values.get if self._is_flat else partial(_read, values)
        inputs = list(map(read, self.in_keys))
        for value in inputs:
            if type(value) is not Tensor and not (self.takes_subclasses and isinstance(value, Tensor)):
                return f"an entry of {list(self.in_keys)} is missing, or no plain tensor"
        output = self.function(*inputs)
        outputs: Any = (output,)
        if type(output) is not Tensor or len(self.out_keys) != 1:
            outputs = _outputs(output, self.out_keys)
            if isinstance(outputs, str):
                return f"{_name(self.function)} {outputs}"
        for key, value in zip(self.out_keys, outputs):  # noqa: B905 - faster
            if key == _IGNORED:
                continue
            if type(value) is not Tensor and not (self.takes_subclasses and isinstance(value, Tensor)):
                return f"{_name(self.function)} returned {type(value).__qualname__} for {show_key(key)}"
            if not self._is_flat:
                if not _write(values, key if isinstance(key, tuple) else (key,), value, size, device):
                    return self._misfit(key, value, size, device)
            elif value.shape[: len(size)] == size and (device is None or value.device == device):
                values[key] = value
            else:
                return self._misfit(key, value, size, device)
        return None

    def _misfit(self, key: NestedKey, value: Tensor, size: torch.Size, device: torch.device | None) -> str:
        expected = ", ".join([*map(str, size), "..."])
        where = "" if device is None else f" on {device}"
        return (
            f"{_name(self.function)} returned {show_key(key)} of shape {list(value.shape)} on {value.device}, "
            f"expected [{expected}]{where}"
        )


class _TensorDictStep:
    """Calls a function of TensorDicts."""

    def __init__(self, function: Runner, of: object) -> None:
        self._function = function
        self._of = of

    def __call__(self, values: Values, size: torch.Size, device: torch.device | None) -> str | None:
        output = self._function(build(values.copy(), size, device))
        if type(output) is not TensorDict or output.batch_size != size or output.device != device:
            return f"{_name(self._of)} returned another kind of TensorDict than it was given"
        values.clear()
        values.update(entries(output))
        return None


class _ModeScope:
    """Runs steps under the default exploration mode of a module, where none is in force.

    Args:
        module: what has a ``default_interaction_type``.
        steps: what runs.
    """

    def __init__(self, module: Any, steps: Sequence[_Step]) -> None:
        self.module = module
        self.steps = steps

    def __call__(self, values: Values, size: torch.Size, device: torch.device | None) -> str | None:
        with self._mode():
            for step in self.steps:
                if (reason := step(values, size, device)) is not None:
                    return reason
        return None

    def _mode(self) -> AbstractContextManager[None]:
        if interaction_type() is not None:
            return nullcontext()
        return set_interaction_type(self.module.default_interaction_type)


def _keys(steps: Sequence[_TensorStep]) -> tuple[tuple[NestedKey, ...], tuple[NestedKey, ...]]:
    """The entries that steps read and have not written before, and those that they write."""
    read: dict[NestedKey, None] = {}
    written: dict[NestedKey, None] = {}
    for step in steps:
        read.update(dict.fromkeys(key for key in step.in_keys if key not in written))
        written.update(dict.fromkeys(key for key in step.out_keys if key != _IGNORED))
    return tuple(read), tuple(written)


def _first_functions(steps: Sequence[_Step]) -> Iterator[_TensorStep]:
    """The functions of tensors that run before anything else."""
    for step in steps:
        if isinstance(step, _ModeScope):
            yield from _first_functions(step.steps)
        if not isinstance(step, _TensorStep):
            return
        yield step


class Plan:
    """What a policy does, as steps.

    Args:
        steps: what a pass does, in order.
        model: what the plan is of, and what is called where the plan is not for a batch; ``None``: such a batch is
            an error.
        watched: the TensorDict modules whose hooks, and whose modules, must be as they are now.
    """

    def __init__(
        self, steps: Sequence[_Step], model: Runner | None = None, watched: Sequence[TensorDictModuleBase] = ()
    ) -> None:
        self._steps = tuple(steps)
        self._model = model
        self._watched = watched
        first = list(_first_functions(steps))
        self._in_keys = _keys(first)[0]
        self._is_flat = all(isinstance(key, str) for key in self._in_keys)
        # What is no function of tensors may look at every entry, and at the mode.
        self._is_of_tensors = all(isinstance(step, _TensorStep) for step in steps)
        # Dictionaries that torch changes in place. To compare lists of them is one call of C.
        observed = () if model is None else (*watched, torch_module)
        self._hooks = tuple(hooks for module in observed for hooks in _hooks(module))
        self._children = [children for module in watched for children in _children(module)]
        self._known_children = [dict(children) for children in self._children]
        attributes = [vars(module) for module in watched]
        self._functions = [(own, own["module"]) for own in attributes if "module" in own]  # which are no modules

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Run the plan.

        Args:
            batch: ``[B, *size]``; it is not changed, unless a function writes to a tensor of it.

        Returns:
            A TensorDict ``[B, *size]`` with the entries of the batch and the outputs.

        Raises:
            InvalidRequestError: an entry is missing, or no tensor, and there is no model to ask.
            ModelError: a function did not return what is expected, and there is no model to ask.
        """
        values = self.read(batch)
        output = "" if values is None else self.run(values, batch)
        if not isinstance(output, str):
            return output
        if self._model is not None:
            return self._model(batch)
        if missing := [key for key in self._in_keys if not isinstance(_read(entries(batch), key), Tensor)]:
            raise InvalidRequestError(f"the request has no tensor {', '.join(map(show_key, missing))}")
        raise ModelError(output)

    def read(self, batch: TensorDictBase) -> Values | None:
        """The entries of a batch, for :meth:`run`; ``None`` if it is unusual, or if the policy was changed."""
        if self._model is not None and (
            type(batch) is not TensorDict
            or any(self._hooks)
            or self._children != self._known_children
            or (self._functions and any(own.get("module") is not function for own, function in self._functions))
            or skip_existing()
        ):
            return None
        return entries(batch).copy()

    def layout(self, values: Values) -> Any:
        """What batches have in common that a plan treats alike; ``None`` where it is not for them."""
        described: tuple[Any, ...] = ()
        for key in self._in_keys:
            tensor = values.get(key) if self._is_flat else _read(values, key)
            if type(tensor) is not Tensor:
                return None
            described += (tensor.dtype, tensor.shape[1:], tensor.device)
        return described if self._is_of_tensors else (interaction_type(), _describe(values))

    def run(self, values: Values, batch: TensorDictBase) -> TensorDictBase | str:
        """The output for a batch whose entries :meth:`read` returned; or why the plan is not for it."""
        size, device = batch.batch_size, batch.device
        for step in self._steps:
            if (reason := step(values, size, device)) is not None:
                return reason
        return build(values, size, device)

    def compiled(self, compile: Compile) -> Plan:
        """Join consecutive functions of tensors to one, and hand each such one to ``compile``; sampling stays as it is.

        Args:
            compile: a function of tensors to one that does the same.
        """
        return Plan(_compiled(self._steps, compile), self._model, self._watched)


def _hooks(module: Any) -> list[Mapping[Any, Any]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_global_forward_hooks", "_global_forward_pre_hooks")
    return [hooks for name in names if (hooks := getattr(module, name, None)) is not None]


def _children(module: TensorDictModuleBase) -> list[dict[str, Any]]:
    inner = module._modules.get("module")
    containers = [inner] if isinstance(inner, nn.ModuleList | nn.ModuleDict) else []
    return [one._modules for one in (module, *containers)]


def _describe(values: Mapping[str, Any]) -> Any:
    described: list[Any] = []
    for key, value in values.items():
        if isinstance(value, Tensor):
            described.append((key, value.dtype, value.shape[1:], value.device))
        elif is_nested(value):
            described.append((key, value.batch_size[1:], _describe(entries(value))))
        else:
            described.append((key, type(value)))
    return tuple(described)


def _read(values: Mapping[Any, Any], key: NestedKey) -> Any:
    if isinstance(key, str):
        return values.get(key)
    for name in key[:-1]:
        nested = values.get(name)
        if type(nested) is not TensorDict:
            return None
        values = entries(nested)
    return values.get(key[-1])


def _write(
    values: Values, path: tuple[NestedKey, ...], value: Tensor, size: torch.Size, device: torch.device | None
) -> bool:
    """Put a tensor among the entries of a TensorDict ``[*size]``; return whether it fits there."""
    name, rest = path[0], path[1:]
    if not rest:
        if value.shape[: len(size)] != size or (device is not None and value.device != device):
            return False
        values[name] = value
        return True
    nested = values.get(name)
    if nested is None:
        nested = build({}, size, device)
    elif type(nested) is not TensorDict:
        return False
    inner = entries(nested).copy()
    if not _write(inner, rest, value, nested.batch_size, nested.device):
        return False
    values[name] = build(inner, nested.batch_size, nested.device)
    return True


def _outputs(output: Any, keys: Sequence[NestedKey]) -> Sequence[Any] | str:
    """What a function returned, one for each key; or what is wrong with it."""
    if isinstance(output, (Mapping, TensorDictBase)):
        found = dict(zip(_unravelled(output.keys()), output.values(), strict=True))
        if missing := [key for key in keys if key not in found]:
            return f"returned no {', '.join(map(show_key, missing))}"
        return [found[key] for key in keys]
    outputs: Sequence[Any] = output if isinstance(output, (tuple, list)) else (output,)
    if len(outputs) != len(keys):
        return f"returned {len(outputs)} outputs for out_keys {list(keys)}"
    return outputs


def _unravelled(keys: Iterable[NestedKey]) -> list[NestedKey]:
    return list(unravel_key_list(list(keys)))  # type: ignore[no-untyped-call]


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


# -- joined functions ----------------------------------------------------------------------------------


def _compiled(steps: Sequence[_Step], compile: Compile) -> list[_Step]:
    compiled: list[_Step] = []
    run: list[_TensorStep] = []
    for step in (*steps, None):
        if isinstance(step, _TensorStep):
            run.append(step)
            continue
        if run:
            compiled.append(_joined(run, compile))
            run = []
        if isinstance(step, _ModeScope):
            compiled.append(_ModeScope(step.module, _compiled(step.steps, compile)))
        elif step is not None:
            compiled.append(step)
    return compiled


def _joined(steps: Sequence[_TensorStep], compile: Compile) -> _TensorStep:
    if len(steps) == 1:
        step = steps[0]
        function = compile(step.function)
        return _TensorStep(function, step.in_keys, step.out_keys, takes_subclasses=step.takes_subclasses)
    in_keys, out_keys = _keys(steps)

    def joined(*tensors: Tensor) -> tuple[Any, ...]:
        values: dict[NestedKey, Any] = dict(zip(in_keys, tensors, strict=True))
        for step in steps:
            outputs = _outputs(step.function(*[values[key] for key in step.in_keys]), step.out_keys)
            if isinstance(outputs, str):
                raise ModelError(f"{_name(step.function)} {outputs}")
            values.update(zip(step.out_keys, outputs, strict=True))
        return tuple([values[key] for key in out_keys])

    return _TensorStep(compile(joined), in_keys, out_keys)


# -- what can be planned -------------------------------------------------------------------------------


def plan_function(function: Function, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> Plan:
    """Plan a function of tensors, such as a plain ``nn.Module``.

    Args:
        function: takes a tensor ``[B, ...]`` for each of ``in_keys``; returns one for each of ``out_keys``, in order: a
            tensor, a tuple or a list of them, or a mapping that has them.
        in_keys: the entries of a batch that it is called with.
        out_keys: the entries that it returns; ``"_"`` is not kept.

    Returns:
        A plan that raises :class:`ModelError` where something else is returned.
    """
    return Plan([_TensorStep(function, _unravelled(in_keys), _unravelled(out_keys), takes_subclasses=True)])


def plan_policy(model: Runner) -> Plan | None:
    """Plan a policy: a TensorDict module, a sequence of them, or a probabilistic one.

    Returns:
        The plan; ``None`` where anything about the policy is unusual, so that it must be called as it is.
    """
    watched: list[TensorDictModuleBase] = []
    try:
        steps = _steps(model, watched)
    except AttributeError:  # of a tensordict that has other parts inside
        return None
    return None if steps is None else Plan(steps, model, watched)


def make_runner(model: Runner) -> Runner:
    """What does the same as a policy, by a plan if it has one."""
    planned = plan_policy(model)
    return model if planned is None else CheckedPlan(model, planned)


_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "forward")
_KEYS = ("in_keys", "out_keys", "out_keys_source")
_OF_MODULE = (*_CALLS, *_KEYS, "_call_module", "_write_to_tensordict")
_OF_SEQUENCE = (*_CALLS, "_run_module", "_module_iter")
_OF_SAMPLER = (*_OF_SEQUENCE, "get_dist_params", "_last_module")


def _steps(module: Any, watched: list[TensorDictModuleBase]) -> list[_Step] | None:
    """The steps of a module, and what is to be watched while they are used; ``None`` if it is unusual."""
    found: list[TensorDictModuleBase] = []
    steps: list[_Step] | None = None
    if _is_plain(module, TensorDictModule, _OF_MODULE):
        steps = _steps_of_module(module)
    elif _is_plain(module, TensorDictSequential, _OF_SEQUENCE):
        steps = _steps_of_sequence(module, found)
    elif _is_plain(module, ProbabilisticTensorDictSequential, _OF_SAMPLER):
        steps = _steps_of_sampler(module, found)
    elif isinstance(module, ProbabilisticTensorDictModule) and (function := _undecorated(module)) is not None:
        steps = [_TensorDictStep(function, module)]
    if steps is not None:
        watched += [module, *found]
    return steps


def _is_plain(module: Any, kind: type[nn.Module], names: Sequence[str]) -> bool:
    """Whether an instance of ``kind``, or of a subclass, does the same as ``kind`` itself, and nothing besides."""
    return (
        isinstance(module, kind)
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in names)
        and not any(name in vars(module) for name in names)
        and _is_called_plainly(module)
    )


def _is_called_plainly(module: nn.Module) -> bool:
    """Whether to call the module is to call its ``forward``."""
    unusual = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return not any(vars(module).get(name) or getattr(torch_module, "_global" + name, None) for name in unusual)


def _steps_of_module(module: TensorDictModule) -> list[_Step] | None:
    usual = (
        module.inplace is True
        and module._kwargs is None
        and module.method is None
        and not module.method_kwargs
        and not module._get_kwargs
        and module.out_keys == module.out_keys_source
    )
    return [_TensorStep(module.module, module.in_keys, module.out_keys)] if usual else None


def _is_usual_sequence(module: TensorDictSequential) -> bool:
    return module.inplace is None and not module.partial_tolerant and not module._select_before_return


def _steps_of_sequence(module: TensorDictSequential, watched: list[TensorDictModuleBase]) -> list[_Step] | None:
    if not _is_usual_sequence(module):
        return None
    steps: list[_Step] = []
    for part in _parts(module):
        planned = _steps(part, watched)
        steps += [_part(part, watched)] if planned is None else planned
    return steps


def _parts(module: TensorDictSequential) -> list[Any]:
    inner: Any = module.module
    return list(inner.values() if isinstance(inner, nn.ModuleDict) else inner)


def _part(module: Any, watched: list[TensorDictModuleBase]) -> _Step:
    """A part of a sequence that is no function of tensors."""
    function = _undecorated(module)
    if function is None:
        return _TensorDictStep(module, module)
    watched.append(module)
    return _TensorDictStep(function, module)


def _steps_of_sampler(
    module: ProbabilisticTensorDictSequential, watched: list[TensorDictModuleBase]
) -> list[_Step] | None:
    last = _parts(module)[-1]
    before = vars(module).get("_det_part")
    if (
        not _is_usual_sequence(module)
        or module.return_composite
        or not module._requires_sample
        or not isinstance(last, ProbabilisticTensorDictModule)
    ):
        return None
    steps, sample = _steps(before, watched), _steps(last, watched)
    if steps is None or sample is None:
        return None
    default = next(part for part in reversed(_parts(module)) if hasattr(part, "default_interaction_type"))
    return [_ModeScope(default, steps), *sample]


def _wrappers() -> list[Any]:
    """The code that tensordict wraps around ``forward``: to take tensors for a TensorDict, and to skip what exists."""
    found: list[Any] = []
    function: Any = TensorDictModule.forward
    while hasattr(function, "__wrapped__"):
        found.append(function.__code__)
        function = function.__wrapped__
    return found


_WRAPPERS = _wrappers()


def _undecorated(module: Any) -> Runner | None:
    """The ``forward`` of a TensorDict module without what tensordict wraps around it; ``None`` if that is unusual."""
    if (
        not isinstance(module, TensorDictModuleBase)
        or not all(getattr(type(module), name, None) is getattr(nn.Module, name, None) for name in _CALLS[:-1])
        or any(name in vars(module) for name in _CALLS)
        or not _is_called_plainly(module)
    ):
        return None
    function: Any = type(module).forward
    while getattr(function, "__code__", None) in _WRAPPERS and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return partial(function, module)


# -- a plan that is compared with its policy first -----------------------------------------------------


class CheckedPlan:
    """Runs a plan for batches of a layout whose first batch has shown that it does what the policy does.

    For that first batch the policy runs, whose output counts, then the plan, from the same states of buffers and
    generators. Outputs and states must be equal afterwards; else the policy is called from then on, and the log says
    why. A policy that has changed its own attributes is not run a second time: it is called as it is, and has no plan
    if it does so again and again.

    Args:
        model: the policy.
        plan: of it.
    """

    def __init__(self, model: Runner, plan: Plan) -> None:
        self._model = model
        self._plan: Plan | None = plan
        self._checked: set[Any] = set()
        self._doubts = 0

    @property
    def plan(self) -> Plan | None:
        """The plan; ``None`` once it has shown that it does something else than the policy."""
        return self._plan

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        plan = self._plan
        if plan is None or (values := plan.read(batch)) is None or (layout := plan.layout(values)) is None:
            return self._model(batch)
        if layout not in self._checked and len(self._checked) < _MOST_LAYOUTS:
            return self._compare(plan, layout, batch)
        output = plan.run(values, batch)
        return self._model(batch) if isinstance(output, str) else output

    def _compare(self, plan: Plan, layout: Any, batch: TensorDictBase) -> TensorDictBase:
        modules = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        if any(map(is_lazy, _tensors(modules))):  # what they are is known after their first call
            return self._model(batch)
        try:
            copy, before = batch.clone(), _State(modules)
        except Exception as error:
            self._drop(describe(error))
            return self._model(batch)
        attributes = _attributes(modules)
        output = self._model(batch)
        if not _are_same(attributes, _attributes(modules)):
            self._doubt("it changes attributes of its own")
            return output
        try:
            after = _State(modules)
            drew = not before.has_generators_of(after)
            try:
                before.restore()
                values = plan.read(copy)
                again = "it is unusual" if values is None else plan.run(values, copy)
                reason = again if isinstance(again, str) else _difference(output, again) or after.difference()
            finally:
                after.restore()
        except Exception as error:
            self._drop(describe(error))
            return output
        if reason is None:
            self._checked.add(layout)
        elif drew:
            self._doubt(reason)
        else:
            self._drop(reason)
        return output

    def _doubt(self, reason: str) -> None:
        self._doubts += 1
        if self._doubts == _MOST_DOUBTS:
            self._drop(reason)

    def _drop(self, reason: str) -> None:
        self._plan = None
        _log.warning("%s is called as it is, since a plan of it does not do the same: %s", _name(self._model), reason)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    groups = [group for module in modules for group in (module._parameters, module._buffers)]
    return [tensor for group in groups for tensor in group.values() if tensor is not None]


_WEIGHTS = ("_parameters", "_buffers", "_modules")


def _attributes(modules: Sequence[nn.Module]) -> list[Any]:
    """What modules, and the objects whose methods they call, refer to, beside parameters and buffers."""
    found: list[Any] = []
    for module in modules:
        own = vars(module)
        found += [value for name, value in own.items() if name not in _WEIGHTS]
        function = own.get("module")  # of a TensorDict module
        found += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        found += getattr(getattr(function, "__self__", function), "__dict__", {}).values()
    found += [item for value in found for item in _items(value)]
    versions = [value._version for value in found if isinstance(value, Tensor) and not value.is_inference()]
    return [*found, *versions]


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | deque | set) else ()


def _are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists have the same objects, where integers need only be equal."""
    return len(ours) == len(theirs) and all(
        one is other or (type(one) is int and one == other) for one, other in zip(ours, theirs, strict=True)
    )


class _State:
    """The buffers of modules, and the generators that they may draw from, as they are now."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            generators += torch.cuda.default_generators
        generators += [value for one in modules for value in vars(one).values() if isinstance(value, torch.Generator)]
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._buffers = [
            (one._buffers, name, buffer, buffer.clone())
            for one in modules
            for name, buffer in one._buffers.items()
            if buffer is not None
        ]

    def has_generators_of(self, other: _State) -> bool:
        """Whether all generators are in the same state in both."""
        both = zip(self._generators, other._generators, strict=False)
        return all(torch.equal(state, later) for (_, state), (_, later) in both)

    def difference(self) -> str | None:
        """What is not as it was; ``None`` if nothing."""
        for generator, state in self._generators:
            if not torch.equal(generator.get_state(), state):
                return "it draws other random numbers"
        for group, name, _, value in self._buffers:
            found = group.get(name)
            if found is None or not _equal(found, value):
                return f'it writes another value to the buffer "{name}"'
        return None

    def restore(self) -> None:
        """Write back what is not as it was."""
        for generator, state in self._generators:
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
        for group, name, buffer, value in self._buffers:
            group[name] = buffer
            if not _equal(buffer, value):
                buffer.copy_(value)


def _difference(expected: Any, found: Any, key: str = "the output") -> str | None:
    if isinstance(expected, Tensor) or isinstance(found, Tensor):
        if type(expected) is not type(found) or not _equal(expected, found):
            return f"{key} is another one"
        return None
    if not is_nested(expected) or not is_nested(found):
        return None if type(expected) is type(found) else f"{key} is of another type"
    if expected.batch_size != found.batch_size or expected.device != found.device:
        return f"{key} has another batch size or device"
    ours, theirs = dict(expected.items()), dict(found.items())
    if ours.keys() != theirs.keys():
        return f"{key} has the entries {sorted(theirs)}, expected {sorted(ours)}"
    differences = (_difference(value, theirs[name], show_key(name)) for name, value in ours.items())
    return next((difference for difference in differences if difference is not None), None)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in type and value, where NaN is equal to NaN."""
    if one.dtype is not other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(torch.all((one == other) | ((one != one) & (other != other))))
