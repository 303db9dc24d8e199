"""Specs of torchrl's environments as layouts, and random actions drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aioinfer.collectors.spaces import ArraySpec, Column, EnvLayout, InfoKeys, info_specs

__all__ = ["SpecSampler", "action_leaves", "torchrl_layout"]

_RESERVED = frozenset(
    {"action", "next", "reward", "done", "terminated", "truncated", "is_init", "policy_version", "collector"}
)
_SAMPLED = frozenset({"Bounded", "Unbounded", "OneHot", "MultiOneHot", "Categorical", "MultiCategorical", "Binary"})


def torchrl_layout(env: Any, info_keys: InfoKeys = ()) -> EnvLayout:
    """The layout of one row of a torchrl environment: its observations have their own keys.

    Raises:
        TypeError: an entry has no fixed layout.
        ValueError: an entry has the name of one that batches have anyway, or actions have other names than "action".
    """
    observation = _leaves(env.observation_spec, len(env.batch_size))
    for leaf in observation:
        if leaf.path[0] in _RESERVED:
            raise ValueError(
                f'the observation "{leaf.path[0]}" of {_name(env)} has the name of an entry that batches have anyway; '
                "rename it in the environment"
            )
    action = tuple(spec for spec, _ in action_leaves(env))
    for leaf in action:
        if leaf.path[0] != "action":
            raise ValueError(f'the action of {_name(env)} is at {leaf.path}, expected "action"')
    rewards = prod(env.reward_spec.shape)
    if rewards != env.batch_size.numel():
        raise ValueError(f"{_name(env)} has {rewards} rewards for {env.batch_size.numel()} environments")
    return EnvLayout(observation, action, info_specs(info_keys))


def action_leaves(env: Any) -> list[tuple[ArraySpec, Any]]:
    """The leaves of an action, each with its spec, which is that of all rows."""
    specs = env.full_action_spec
    return [(leaf, specs[leaf.path]) for leaf in _leaves(specs, len(env.batch_size))]


class SpecSampler:
    """Draws actions of one row from specs, with a generator of its own.

    Args:
        leaves: as :func:`action_leaves` returns them.
        rows: of the environment.
        row: the one to draw for.
    """

    def __init__(self, leaves: Sequence[tuple[ArraySpec, Any]], rows: int, row: int) -> None:
        self._leaves = leaves
        self._rows = rows
        self._row = row
        self._generator = np.random.default_rng()

    def __deepcopy__(self, memo: Any) -> SpecSampler:
        return SpecSampler(self._leaves, self._rows, self._row)

    def seed(self, seed: int) -> None:
        """Begin the sequence of that seed."""
        self._generator = np.random.default_rng(seed)

    def sample(self) -> list[NDArray[Any]]:
        """Draw the leaves of one action.

        Raises:
            TypeError: no way is known to draw from a spec.
        """
        return [self._draw(leaf, spec) for leaf, spec in self._leaves]

    def _draw(self, leaf: ArraySpec, spec: Any) -> NDArray[Any]:
        draw = self._generator
        match next((base.__name__ for base in type(spec).__mro__ if base.__name__ in _SAMPLED), None):
            case "Bounded":
                bounds = (spec.space.low, spec.space.high)
                low, high = (bound.reshape(self._rows, *leaf.shape)[self._row].cpu().numpy() for bound in bounds)
                if leaf.dtype.kind == "f":
                    return np.asarray(draw.uniform(low, high), leaf.dtype)
                return np.asarray(draw.integers(low, high, endpoint=True), leaf.dtype)
            case "Unbounded":
                return np.asarray(draw.normal(size=leaf.shape), leaf.dtype)
            case "OneHot":
                return np.eye(spec.space.n, dtype=leaf.dtype)[draw.integers(spec.space.n, size=leaf.shape[:-1])]
            case "MultiOneHot":
                hots = [np.eye(box.n, dtype=leaf.dtype)[draw.integers(box.n)] for box in spec.space]
                return np.concatenate(hots)
            case "Categorical":
                return np.asarray(draw.integers(spec.space.n, size=leaf.shape), leaf.dtype)
            case "MultiCategorical":
                counts = spec.nvec.reshape(-1, *leaf.shape)[0].cpu().numpy()
                return np.asarray(draw.integers(counts), leaf.dtype)
            case "Binary":
                return np.asarray(draw.integers(2, size=leaf.shape), leaf.dtype)
        raise TypeError(f"no random actions can be drawn from {spec}")


def _leaves(specs: Any, batch_dims: int) -> tuple[ArraySpec, ...]:
    leaves = []
    for key in specs.keys(True, True):
        path, spec = (key,) if isinstance(key, str) else tuple(key), specs[key]
        shape = tuple(spec.shape[batch_dims:])
        try:
            dtype = torch.empty((), dtype=spec.dtype).numpy().dtype
        except TypeError as error:  # no dtype of tensors, or none that arrays have
            raise TypeError(f"the spec of {path} has no fixed layout: {spec}") from error
        if spec.dtype is None or any(size < 0 for size in shape):
            raise TypeError(f"the spec of {path} has no fixed layout: {spec}")
        leaves.append(ArraySpec(path, shape, dtype))
    return tuple(sorted(leaves, key=lambda leaf: leaf.path))


def _name(env: Any) -> str:
    return type(env).__name__


def sample_columns(leaves: Sequence[tuple[ArraySpec, Any]]) -> list[Column]:
    """The leaves of what :meth:`SpecSampler.sample` returns."""
    return [Column(leaf, (index,)) for index, (leaf, _) in enumerate(leaves)]
