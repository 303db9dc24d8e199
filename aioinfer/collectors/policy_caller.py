"""Asks the policy for the actions of a group: one request with as many rows as environments wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aioinfer.client import InferenceClient
from aioinfer.collectors.lockstep import TURN_KEY
from aioinfer.collectors.policy_layout import PolicyLayout, StateSpec, request_entry
from aioinfer.tensors import build, entries

__all__ = ["Policy", "PolicyCaller", "ServedPolicy"]

Array: TypeAlias = NDArray[Any]


class PolicyCaller:
    """Makes the requests of a group and takes its replies apart. One thread's, or one task's.

    Args:
        layout: what requests and replies have.
        observations: ``[size, *shape]`` for each entry of ``layout.observation``, which always hold the observations
            that the policy is to be asked with.
        is_init: ``[size]``: whether each is the first of an episode.
        group: the number of the group, for requests that say who asks.
        owned: whether the policy may write to requests, so that none may share the memory of the observations.

    Attributes:
        size: how many rows there are.
        states: ``[size, *shape]`` for each state: what the policy was asked with last, or is to be asked with.
    """

    def __init__(
        self,
        layout: PolicyLayout,
        observations: Sequence[Array],
        is_init: Array,
        group: int = 0,
        *,
        owned: bool = False,
    ) -> None:
        self._layout = layout
        self._is_init = is_init
        self.size = size = len(is_init)
        self._initial = [_initial(state) for state in layout.states]
        self.states = [np.broadcast_to(initial, (size, *initial.shape)).copy() for initial in self._initial]
        self._next_states = [state.copy() for state in self.states]
        sent = [spec.path for spec in layout.observation]
        self._sources = [*observations]
        if layout.sends_is_init:
            sent.append(("is_init",))
            self._sources.append(is_init.reshape(size, 1))
        sent += [state.spec.path for state in layout.states]
        self._sources += self.states
        self._turn = np.zeros((size, 2), np.int64)
        self._turn[:, 0] = group
        if layout.sends_turn:
            sent.append((TURN_KEY,))
            self._sources.append(self._turn)
        self._sent = sent
        self._received = [spec.path for spec in (*layout.action, *layout.outputs)]
        self._is_flat = all(len(path) == 1 for path in self._received)
        self._version = layout.version_key
        # Requests of all rows share the memory of the observations, but for texts.
        shares = not owned and all(source.dtype != object for source in self._sources)
        self._all = _request(sent, self._sources) if shares else None

    def request(self, rows: Array | None) -> TensorDict:
        """Make the request of some rows, or of all.

        One of all rows is theirs until the reply is there, one of some rows is a copy.
        """
        if self._layout.sends_turn:
            self._turn[:, 1] += 1
        if self.states:
            for state, following, initial in zip(self.states, self._next_states, self._initial, strict=True):
                state[...] = following
                state[self._is_init] = initial
        if self._all is not None and rows is None:
            return self._all
        sources = [source.copy() if rows is None else source.take(rows, 0) for source in self._sources]
        return _request(self._sent, sources)

    def advance(self, row: int) -> None:
        """Let the states of a row be those of its next request, which may be made later."""
        for state, following, initial in zip(self.states, self._next_states, self._initial, strict=True):
            state[row] = initial if self._is_init[row] else following[row]

    def read(self, reply: TensorDictBase, rows: Array | None) -> tuple[list[Array], Array]:
        """Take a reply apart: its actions and outputs, and the version of each row."""
        chosen = slice(None) if rows is None else rows
        for state, following in zip(self._layout.states, self._next_states, strict=True):
            following[chosen] = _array(reply.get(state.reply_path))
        if self._is_flat and type(reply) is TensorDict:  # a fifth of the time
            found = entries(reply)
            return [_array(found[name]) for (name,) in self._received], found[self._version].numpy()
        return [_array(reply.get(path)) for path in self._received], reply.get(self._version).numpy()


def _array(value: Tensor) -> Array:
    return (value.detach() if value.requires_grad else value).numpy()  # as a view of a parameter does


def _initial(state: StateSpec) -> Array:
    spec = state.spec
    return np.frombuffer(state.initial, spec.dtype).reshape(spec.shape) if state.initial else np.zeros(*spec[1:])


def _request(paths: Sequence[tuple[str, ...]], sources: Sequence[Array]) -> TensorDict:
    request = build({}, torch.Size((len(sources[0]),)), None)
    found = entries(request)
    for path, source in zip(paths, sources, strict=True):
        if len(path) == 1:  # to set it takes ten times as long
            found[path[0]] = request_entry(source)
        else:
            request.set(path, request_entry(source))
    return request


class Policy(Protocol):
    """What computes the actions of a group, which calls it from its thread."""

    def __call__(self, request: TensorDict) -> TensorDictBase:
        """The reply to a request ``[B]``, which may lie in memory that the next one takes."""
        ...

    def close(self) -> None:
        """End."""
        ...


class ServedPolicy:
    """The policy of a server.

    Args:
        clients: reach it; several, where each takes few rows.
    """

    def __init__(self, clients: Sequence[InferenceClient]) -> None:
        self._clients = list(clients)

    def __call__(self, request: TensorDict) -> TensorDictBase:
        most = self._clients[0].max_rows
        if most is None or len(request) <= most:
            return self._clients[0](request, wait=True)
        parts = zip(self._clients, request.split(most), strict=False)
        futures = [client.submit(part) for client, part in parts]
        join: Any = torch.cat
        reply: TensorDictBase = join([future.result() for future in futures])
        return reply

    def close(self) -> None:
        for client in self._clients:
            client.close()
