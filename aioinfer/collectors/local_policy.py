"""A policy that groups of environments run themselves: copies of it, and the weights that are published for them."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from aioinfer.errors import WeightSyncError, describe
from aioinfer.interaction_type import INHERIT, MODES_ARE_OF_THREADS, InteractionType, use_mode
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.pickling import pickler
from aioinfer.plan import make_runner
from aioinfer.tensors import build, check_output, entries
from aioinfer.weight_sync.snapshot import Layout, clone_tensors, copy_tensors
from aioinfer.weight_sync.weights import extract_tensors

__all__ = ["LocalPolicy", "PickledPolicy", "PolicySource", "PublishedWeights", "make_source"]

# Bytes of weights. To run a larger policy takes so long that a request to a server, which has all cores, matters less.
_SMALL = 4 * 2**20


# -- the policy --------------------------------------------------------------------------------------------


class PickledPolicy(NamedTuple):
    """A policy on its way to a worker."""

    model: bytes
    layout: bytes
    """Of its published weights."""


@dataclass(frozen=True)
class PolicySource:
    """Where the groups of a process get their copies of the policy.

    Attributes:
        make: makes a copy.
        weights: the published ones.
        pickled: the same for workers; ``None`` if there are none.
    """

    make: Callable[[], nn.Module]
    weights: PublishedWeights
    pickled: PickledPolicy | None = None

    @classmethod
    def of_worker(cls, pickled: PickledPolicy, descriptor: int) -> PolicySource:
        """That of a worker, with the descriptor of the weights' memory, which is its own from now on."""
        weights = PublishedWeights(pickled.layout, descriptor=descriptor)
        return cls(partial(pickle.loads, pickled.model), weights)


def make_source(policy: Any, *, for_workers: bool, only_if_sensible: bool) -> PolicySource:
    """Let groups run copies of a policy.

    Args:
        policy: the policy.
        for_workers: whether other processes are to run it. It pickles then, by ``cloudpickle`` where that is installed.
        only_if_sensible: refuse also what works, but may surprise: a large policy; one that has random numbers of its
            own, which would be the same in all copies; one that is compiled, which each copy would be again; and for
            workers one that ``pickle`` can't pickle, whose functions would not see what the program changes.

    Raises:
        ValueError: why not.
    """
    if not isinstance(policy, nn.Module):
        raise ValueError("it is no nn.Module")
    if any(type(module).get_extra_state is not nn.Module.get_extra_state for module in policy.modules()):
        raise ValueError("its modules have extra states")
    try:
        tensors = extract_tensors(policy)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if any(not tensor.is_cpu for tensor in tensors.values()):
        raise ValueError("it is not on the CPU")
    layout = Layout.of_tensors(tensors)
    if only_if_sensible:
        _check_sensible(policy, layout.nbytes)
    make: Callable[[], nn.Module] = partial(copy.deepcopy, policy)
    pickled = _pickle(policy, layout, only_if_sensible) if for_workers else None
    try:
        make()
    except Exception as error:  # code of the user's may raise anything
        raise ValueError(f"it can't be copied: {describe(error)}") from error
    weights = PublishedWeights(layout.pickled, shared=for_workers)
    weights.publish(policy, 0)
    return PolicySource(make, weights, pickled)


def _check_sensible(policy: nn.Module, nbytes: int) -> None:
    if nbytes > _SMALL:
        raise ValueError(f"it has {nbytes} bytes of weights, which are more than {_SMALL}")
    for module in policy.modules():
        if hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None:
            raise ValueError("it is compiled")
        if any(isinstance(value, _GENERATORS) for value in vars(module).values()):
            raise ValueError(f"its module {type(module).__qualname__} has random numbers of its own")


_GENERATORS = torch.Generator, np.random.Generator, np.random.RandomState, random.Random


def _pickle(policy: nn.Module, layout: Layout, only_if_sensible: bool) -> PickledPolicy:
    try:
        pickled = pickle.dumps(policy, pickle.HIGHEST_PROTOCOL) if only_if_sensible else pickler()[0](policy)
        pickle.loads(pickled)
    except Exception as error:  # code of the user's may raise anything
        raise ValueError(f"it does not pickle: {describe(error)}") from error
    if only_if_sensible and len(pickled) > 2 * _SMALL:
        raise ValueError(f"it takes {len(pickled)} bytes")
    return PickledPolicy(pickled, layout.pickled)


class LocalPolicy:
    """A copy of the policy, which one group runs itself, with the weights that were published last.

    One thread's.

    Args:
        source: of the copy and its weights.
        version_key: the entry of replies that says which weights computed them.
        mode: the name of the exploration mode; ``None``: whatever is in force.
    """

    def __init__(self, source: PolicySource, version_key: str, mode: str | None) -> None:
        self._model = source.make()
        self._run = make_runner(self._model)
        self._weights = source.weights
        self._number = 0
        self._version = 0
        self._version_key = version_key
        self._versions: dict[int, Tensor] = {}  # by the number of rows of replies
        self._mode = INHERIT if mode is None else InteractionType(mode)

    def __call__(self, request: TensorDictBase) -> TensorDict:
        """Compute the reply to a request ``[B]``, which is the policy's own: it may write to it.

        Raises:
            WeightSyncError: the published weights don't fit this copy, which has changed since it was made.
        """
        rows = request.batch_size[0]
        with _alone(), torch.no_grad(), use_mode(self._mode):
            if self._weights.number != self._number:
                self._load()
            reply = check_output(self._run(request), rows)
        versions = self._versions.get(rows)
        if versions is None:
            versions = torch.full((rows,), self._version, dtype=torch.int64, device="cpu")
            self._versions[rows] = versions
        if type(reply) is not TensorDict:
            reply = reply.to_tensordict()
        return build({**entries(reply), self._version_key: versions}, reply.batch_size, None)

    def _load(self) -> None:
        published = self._weights.read(self._number)
        targets = extract_tensors(self._model)
        for name, tensor in published.tensors.items():
            target = targets.get(name)
            if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
                raise WeightSyncError(
                    f'a copy of the policy has changed so that "{name}" does not fit any more; let a server run it: '
                    "local_inference=False"
                )
        copy_tensors({name: targets[name] for name in published.tensors}, published.tensors)
        self._number, self._version = published.number, published.version
        self._versions.clear()

    def close(self) -> None:
        """Nothing is held."""


_pass_lock = threading.Lock()


def _alone() -> AbstractContextManager[object]:
    """One pass at a time, where the exploration mode is one for the whole process."""
    return nullcontext() if MODES_ARE_OF_THREADS else _pass_lock


# -- its weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that were published.

    Attributes:
        number: how many were published before, plus one.
        version: their version.
        tensors: copies of those that were published since the reader has looked last, by name.
    """

    number: int
    version: int
    tensors: dict[str, Tensor]


class PublishedWeights:
    """The newest weights, in memory that other processes read; who publishes waits for nobody.

    One thread publishes, any thread of any process reads. There are two places, which are written in turn. Each has the
    number of the publication that it holds, or 0 while it is written. A reader looks at the number, copies, and
    looks again: if it has changed the reader begins anew, so that it never gets a part of one and a part of the
    other (a seqlock). A reader that is killed, or stopped, concerns nobody else.

    A publication need not have all tensors: buffers that a policy changes itself are left alone by updates that don't
    have them. So each place also says which publication each tensor is of.

    Args:
        layout: of the weights, pickled.
        descriptor: of the memory, where another process has made it; its own from now on.
        shared: whether other processes are to have it.

    Attributes:
        memory: by whose descriptor another process gets it; ``None`` if it is not shared.
    """

    def __init__(self, layout: bytes, *, descriptor: int | None = None, shared: bool = True) -> None:
        described = Layout.unpickle(layout)
        self._names = [name for name, *_ in described.entries]
        numbers = -(-(_NUMBERS + 2 * len(self._names)) // 8) * 8  # up to a cache line
        nbytes = 8 * numbers + 2 * described.nbytes
        self.memory: AnonymousSharedMemory | None = None
        if descriptor is not None:
            self.memory = AnonymousSharedMemory(descriptor, nbytes, b"")
        elif shared:
            self.memory = AnonymousSharedMemory.create(nbytes)
        memory = torch.zeros(nbytes, dtype=torch.uint8, device="cpu") if self.memory is None else self.memory.memory
        header: Any = memory[: 8 * numbers].numpy().view(np.int64)
        self._latest, self._number_of, self._version_of = header[:1].data, header[1:3].data, header[3:5].data
        self._published_with = header[_NUMBERS : _NUMBERS + 2 * len(self._names)].reshape(2, -1)
        self._places = [
            described.views(memory[start : start + described.nbytes])
            for start in (8 * numbers, 8 * numbers + described.nbytes)
        ]
        self._fence = threading.Lock()

    @property
    def number(self) -> int:
        """How many weights were published so far."""
        return int(self._latest[0])

    def publish(self, model: nn.Module, version: int, names: Collection[str] | None = None) -> None:
        """Publish the weights that a model has now.

        Args:
            model: has them.
            version: of them.
            names: the tensors that have changed; ``None``: all. What is not of the layout is left out.
        """
        number = self.number + 1
        place, other = number % 2, (number - 1) % 2
        self._number_of[place] = 0
        self._order_memory()
        self._version_of[place] = version
        targets = self._places[place]
        new = {
            name: tensor
            for name, tensor in extract_tensors(model).items()
            if (names is None or name in names) and name in targets and targets[name].shape == tensor.shape
        }
        kept = {name: tensor for name, tensor in self._places[other].items() if name not in new}
        copy_tensors(targets, {**kept, **new})
        self._published_with[place] = [
            number if name in new else before
            for name, before in zip(self._names, self._published_with[other].tolist(), strict=True)
        ]
        self._order_memory()
        self._number_of[place] = number
        self._order_memory()
        self._latest[0] = number

    def read(self, seen: int = 0) -> Published:
        """Copy the weights that were published last.

        Args:
            seen: the number of the publication that the reader has.
        """
        while True:
            number = self.number
            place = number % 2
            if self._number_of[place] != number:  # newer ones are written there by now
                continue
            self._order_memory()
            version = self._version_of[place]
            newer = self._names_since(place, seen)
            tensors = clone_tensors({name: self._places[place][name] for name in newer})
            self._order_memory()
            if self._number_of[place] == number:
                return Published(number, version, tensors)

    def _names_since(self, place: int, seen: int) -> Iterator[str]:
        with_numbers = zip(self._names, self._published_with[place].tolist(), strict=True)
        return (name for name, number in with_numbers if number > seen)

    def _order_memory(self) -> None:
        """Let what was read or written before happen before what follows, also for other processors.

        Nothing is moved from before the release of a lock to behind the next acquisition, or the other way round.
        """
        for _ in range(2):
            with self._fence:
                pass


_NUMBERS = 8
"""Of int64 at the beginning: of the latest publication, number and version of each place, and three that are unused."""
