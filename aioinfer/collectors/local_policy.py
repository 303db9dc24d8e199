"""A policy that groups of environments run themselves: copies of it, and the weights that are published for them."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aioinfer.errors import describe
from aioinfer.interaction_type import INHERIT, InteractionType, use_mode
from aioinfer.ipc.memory import AnonymousSharedMemory
from aioinfer.ipc.pickling import pickler
from aioinfer.plan import make_runner
from aioinfer.tensors import build, check_output, entries
from aioinfer.weight_sync.loader import WeightLoader
from aioinfer.weight_sync.snapshot import Layout, clone_tensors, copy_tensors
from aioinfer.weight_sync.weights import Weights, extract_tensors, extract_weights

__all__ = ["LocalPolicy", "PickledPolicy", "PublishedWeights", "pickle_policy"]

# -- the policy --------------------------------------------------------------------------------------------


class PickledPolicy(NamedTuple):
    """A policy on its way to those who run it themselves."""

    model: bytes
    layout: bytes
    """Of its published weights."""


def pickle_policy(policy: Any, *, most_bytes: int | None = None) -> PickledPolicy:
    """Pickle a policy, by ``cloudpickle`` where that is installed.

    Args:
        policy: the policy.
        most_bytes: how many its weights may have; ``None``: any number.

    Raises:
        ValueError: it can't be run elsewhere, or its weights can't be published; the message says why.
    """
    if not isinstance(policy, nn.Module):
        raise ValueError("it is no nn.Module")
    try:
        weights = extract_weights(policy, "tensordict")
    except TypeError as error:
        raise ValueError(str(error)) from None
    if weights.extra_states:
        raise ValueError("its modules have extra states")
    if any(not tensor.is_cpu for tensor in weights.tensors.values()):
        raise ValueError("it is not on the CPU")
    layout = Layout.of_tensors(weights.tensors)
    if most_bytes is not None and layout.nbytes > most_bytes:
        raise ValueError(f"it has {layout.nbytes} bytes of weights, which are more than {most_bytes}")
    try:
        pickled = pickler()[0](policy)
        pickle.loads(pickled)
    except Exception as error:  # code of the user's may raise anything
        raise ValueError(f"it does not pickle: {describe(error)}") from error
    return PickledPolicy(pickled, layout.pickled)


class LocalPolicy:
    """A copy of the policy, which one group runs itself, with the weights that were published last.

    One thread's. Passes of one process come one after the other, since the exploration mode of some versions of
    tensordict is one for the whole process.

    Args:
        policy: the policy.
        weights: the published ones.
        version_key: the entry of replies that says which weights computed them.
        mode: the name of the exploration mode; ``None``: whatever is in force.
        lock: held during a pass.
    """

    def __init__(
        self, policy: PickledPolicy, weights: PublishedWeights, version_key: str, mode: str | None, lock: threading.Lock
    ) -> None:
        model: nn.Module = pickle.loads(policy.model)
        self._run = make_runner(model)
        self._loader = WeightLoader(model)
        self._weights = weights
        self._number = 0
        self._version = 0
        self._version_key = version_key
        self._versions = torch.empty(0, dtype=torch.int64)  # as many as the largest reply had rows
        self._mode = INHERIT if mode is None else InteractionType(mode)
        self._lock = lock

    def __call__(self, request: TensorDictBase) -> TensorDictBase:
        """Compute the reply to a request ``[B]``, which stays as it is."""
        batch = build({key: value.clone() for key, value in entries(request).items()}, request.batch_size, None)
        return self.compute(batch)

    def compute(self, batch: TensorDictBase) -> TensorDictBase:
        """Do so to a request that nobody needs any more, which the policy may change."""
        if self._weights.number != self._number:
            self._load()
        rows = batch.batch_size[0]
        with self._lock, torch.no_grad(), use_mode(self._mode):
            reply = check_output(self._run(batch), rows)
        if len(self._versions) < rows:
            self._versions = torch.full((rows,), self._version, dtype=torch.int64, device="cpu")
        entries(reply)[self._version_key] = self._versions[:rows]
        return reply

    def _load(self) -> None:
        published = self._weights.read()
        self._loader.load(Weights(published.tensors, {}))
        self._number, self._version = published.number, published.version
        self._versions = self._versions[:0]

    def close(self) -> None:
        """Nothing is held."""


# -- its weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that were published.

    Attributes:
        number: how many were published before, plus one.
        version: their version.
        tensors: copies of them, by name.
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

    Args:
        layout: of the weights, pickled.
        descriptor: of the memory, where another process has made it; its own from now on.
        shared: whether other processes are to have it.

    Attributes:
        memory: by whose descriptor another process gets it; ``None`` if it is not shared.
    """

    def __init__(self, layout: bytes, *, descriptor: int | None = None, shared: bool = True) -> None:
        described = Layout.unpickle(layout)
        nbytes = _HEADER + 2 * described.nbytes
        self.memory: AnonymousSharedMemory | None = None
        if descriptor is not None:
            self.memory = AnonymousSharedMemory(descriptor, nbytes, b"")
        elif shared:
            self.memory = AnonymousSharedMemory.create(nbytes)
        memory = torch.zeros(nbytes, dtype=torch.uint8, device="cpu") if self.memory is None else self.memory.memory
        numbers: Any = memory[:_HEADER].numpy().view(np.int64).data
        self._latest = numbers[0:1]
        self._numbers, self._versions = numbers[1:3], numbers[3:5]
        self._places = [
            described.views(memory[start : start + described.nbytes]) for start in (_HEADER, _HEADER + described.nbytes)
        ]
        self._fence = threading.Lock()

    @property
    def number(self) -> int:
        """How many weights were published so far."""
        return int(self._latest[0])

    def publish(self, model: nn.Module, version: int) -> None:
        """Publish the weights that a model has now."""
        number = self.number + 1
        place = number % 2
        self._numbers[place] = 0
        self._order_memory()
        self._versions[place] = version
        copy_tensors(self._places[place], extract_tensors(model))
        self._order_memory()
        self._numbers[place] = number
        self._order_memory()
        self._latest[0] = number

    def read(self) -> Published:
        """Copy the weights that were published last."""
        while True:
            number = self.number
            place = number % 2
            if self._numbers[place] != number:  # newer ones are written there by now
                continue
            self._order_memory()
            version, tensors = self._versions[place], clone_tensors(self._places[place])
            self._order_memory()
            if self._numbers[place] == number:
                return Published(number, version, tensors)

    def _order_memory(self) -> None:
        """Let what was read or written before happen before what follows, also for other processors.

        Nothing is moved from before the release of a lock to behind the next acquisition, or the other way round.
        """
        for _ in range(2):
            with self._fence:
                pass


_HEADER = 64
"""Bytes before the two places: the number of the latest publication, and number and version of each place."""
