"""What a policy is asked with, and what of its replies is kept: found by asking it once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from aioinfer.collectors.spaces import ArraySpec, EnvLayout
from aioinfer.interaction_type import Mode, use_mode
from aioinfer.tensors import entries, show_key

__all__ = [
    "PolicyLayout",
    "StateSpec",
    "example_request",
    "find_policy_layout",
    "reads_is_init",
    "request_entry",
    "run_once",
]

Path = tuple[str, ...]


@dataclass(frozen=True)
class StateSpec:
    """A recurrent state: an entry of requests that is taken from the reply to the request before.

    Attributes:
        spec: of the entry in a request.
        reply_path: where the reply has the next state.
        initial: the bytes of the state at the beginning of an episode; zeros, if there are none.
    """

    spec: ArraySpec
    reply_path: Path
    initial: bytes = b""


@dataclass(frozen=True)
class PolicyLayout:
    """What requests to the policy and its replies have. Pickles.

    Attributes:
        observation: entries of a request that come from the environments.
        sends_is_init: whether a request says which observations are the first of an episode, ``[B, 1]``.
        states: recurrent states.
        action: entries of a reply that the environments get.
        outputs: other entries of a reply that are kept.
        version_key: the entry of a reply that says which weights computed it.
        interaction_type: the name of the exploration mode of requests; ``None``: whatever is in force.
        sends_turn: whether requests say who asks, see :mod:`aioinfer.collectors.lockstep`.
    """

    observation: tuple[ArraySpec, ...]
    sends_is_init: bool
    states: tuple[StateSpec, ...]
    action: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    version_key: str
    interaction_type: str | None = None
    sends_turn: bool = False


def reads_is_init(policy: Any, state_keys: Sequence[NestedKey]) -> bool:
    """Whether requests have to say which observations are the first of an episode."""
    in_keys = getattr(policy, "in_keys", None)
    return bool(state_keys) if in_keys is None else "is_init" in in_keys


def example_request(layout: EnvLayout, *, sends_is_init: bool, states: TensorDictBase | None) -> TensorDict:
    """A request of one row ``[1]``, of the example of an observation that the layout has."""
    td = TensorDict({}, batch_size=[1])
    for spec, value in zip(layout.observation, layout.example, strict=True):
        td.set(spec.path, request_entry(value[None]))
    if sends_is_init:
        td.set("is_init", torch.ones(1, 1, dtype=torch.bool))
    if states is not None:
        td.update(states)
    return td


def request_entry(column: np.ndarray[Any, Any]) -> Any:
    """An array ``[B, *shape]`` as an entry of a request: a tensor that shares its memory, or a copy of its texts."""
    if column.dtype != object:
        return torch.from_numpy(column)
    return NonTensorStack(*[NonTensorData(value) for value in column])


def run_once(policy: Callable[..., Any], request: TensorDict, mode: Mode) -> TensorDictBase:
    """Run a copy of ``policy`` on a batch, and leave torch's random numbers as they are.

    Returns:
        What a server would reply: of a TensorDict module, its ``out_keys``.

    Raises:
        TypeError: the policy does not return a TensorDict.
    """
    try:
        policy = copy.deepcopy(policy)
    except Exception:  # it has no copies: it runs itself
        pass
    out_keys = policy.out_keys if isinstance(policy, TensorDictModuleBase) else None
    with torch.random.fork_rng(devices=[]), torch.no_grad(), use_mode(mode):
        try:
            reply: Any = policy(request)
        except Exception as error:
            if out_keys is None:
                error.add_note(_TAKES_TENSORDICTS)
            raise
    if not isinstance(reply, TensorDictBase):
        raise TypeError(f"the policy returned a {type(reply).__qualname__}; {_TAKES_TENSORDICTS}")
    return reply if out_keys is None else reply.select(*out_keys, strict=False)


_TAKES_TENSORDICTS = (
    "a policy takes and returns a TensorDict; to make one of a function or module of tensors: "
    'TensorDictModule(module, in_keys=["observation"], out_keys=["action"])'
)


def find_policy_layout(
    reply: TensorDictBase,
    layout: EnvLayout,
    *,
    state_keys: Sequence[NestedKey],
    states: TensorDictBase | None,
    sends_is_init: bool,
    version_key: str,
    interaction_type: str | None,
    sends_turn: bool = False,
) -> PolicyLayout:
    """Find out what is kept of replies.

    Args:
        reply: to a request of one row, ``[1]``.
        layout: of the environments.
        state_keys: entries that are recurrent states.
        states: their values at the beginning of an episode, ``[1]``; zeros by default.
        sends_is_init: see :class:`PolicyLayout`.
        version_key: the entry with the version of the weights.
        interaction_type: see :class:`PolicyLayout`.
        sends_turn: see :class:`PolicyLayout`.

    Raises:
        ValueError: the reply lacks an action or a state, or has actions that don't fit the environments.
    """
    found = {path: value for path, value in _leaves(reply) if isinstance(value, Tensor)}
    action = tuple(_action(spec, found) for spec in layout.action)
    state_specs = tuple(_state(key, found, states) for key in state_keys)
    taken = {spec.path for spec in (*layout.observation, *action)} | {(version_key,), ("is_init",)}
    taken |= {state.reply_path for state in state_specs} | {state.spec.path for state in state_specs}
    outputs = tuple(
        ArraySpec(path, tuple(value.shape[1:]), _numpy_dtype(path, value))
        for path, value in sorted(found.items())
        if path not in taken
    )
    for spec in outputs:
        if spec.path[0] in _RESERVED:
            hint = "; name recurrent states in state_keys" if spec.path[0] == "next" else ""
            raise ValueError(
                f"the policy returns {_show(spec.path)}, a name that batches have for something else{hint}"
            )
    return PolicyLayout(
        layout.observation, sends_is_init, state_specs, action, outputs, version_key, interaction_type, sends_turn
    )


_RESERVED = {"next", "done", "terminated", "truncated", "collector"}


def _leaves(td: TensorDictBase, above: Path = ()) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []
    for key, value in entries(td).items():
        path = (*above, key)
        found += _leaves(value, path) if isinstance(value, TensorDictBase) else [(path, value)]
    return found


def _action(spec: ArraySpec, found: dict[Path, Tensor]) -> ArraySpec:
    value = found.get(spec.path)
    if value is None:
        raise ValueError(f"the policy returns no {_show(spec.path)}; it returns {_list(found)}")
    if tuple(value.shape) != (1, *spec.shape):
        raise ValueError(
            f"the policy returns {_show(spec.path)} of shape {list(value.shape[1:])} for each row, "
            f"the environments take {list(spec.shape)}"
            + ("; a discrete action is its number, not one-hot" if spec.dtype.kind == "i" and not spec.shape else "")
        )
    dtype = _numpy_dtype(spec.path, value)
    if not np.can_cast(dtype, spec.dtype, "same_kind") and dtype.kind not in "biu":
        raise ValueError(
            f"the policy returns {_show(spec.path)} of {value.dtype}, the environments take {spec.dtype}: convert it"
        )
    return ArraySpec(spec.path, spec.shape, dtype)


def _state(key: NestedKey, found: dict[Path, Tensor], states: TensorDictBase | None) -> StateSpec:
    path: Any = (key,) if isinstance(key, str) else tuple(key)
    initial = b"" if states is None else _bytes(states.get(path))
    for reply_path in (("next", *path), path):
        value = found.get(reply_path)
        if value is not None:
            return StateSpec(ArraySpec(path, tuple(value.shape[1:]), _numpy_dtype(path, value)), reply_path, initial)
    raise ValueError(f"the policy returns no state {_show(path)}; it returns {_list(found)}")


def _show(path: Path) -> str:
    return show_key(path if len(path) > 1 else path[0])


def _list(found: dict[Path, Tensor]) -> str:
    return ", ".join(map(_show, sorted(found)))


def _bytes(state: Tensor) -> bytes:
    return state[0].numpy().tobytes()


def _numpy_dtype(path: Path, value: Tensor) -> np.dtype[Any]:
    try:
        return value.detach().cpu().numpy().dtype
    except TypeError:
        raise ValueError(
            f"the policy returns {_show(path)} of {value.dtype}, which has no place in a batch; "
            "convert it, or leave it out"
        ) from None
