"""Who computes the actions of asynchronous environments: a server, or a copy of the policy in their event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase

from aioinfer.client import AsyncInferenceClient
from aioinfer.collectors.local_policy import LocalPolicy
from aioinfer.collectors.policy_caller import PolicyCaller
from aioinfer.errors import ServerOverloadedError
from aioinfer.interaction_type import InteractionType, requests_carry

__all__ = ["LONGEST_PASS", "Answer", "ServedTaskPolicy", "TaskPolicy", "TickPolicy", "is_short"]

Array: TypeAlias = NDArray[Any]


Answer: TypeAlias = tuple[Sequence[Array], int, int]
"""Actions and outputs of some rows, ``[k, *shape]`` each, which of the rows is the caller's, and of which weights."""


class TaskPolicy(Protocol):
    """What computes the actions of the tasks of one event loop, or of one of them."""

    def begin(self, row: int) -> Sequence[Array]:
        """Begin a step of an environment; returns each recurrent state, ``[size, *shape]``, as it is to be asked."""
        ...

    async def __call__(self, row: int) -> Answer:
        """The actions for the observation of an environment."""
        ...


class ServedTaskPolicy:
    """The policy of a server, for one task.

    Args:
        client: reaches it.
        caller: makes the requests, which have one row.
        mode: the name of their exploration mode; ``None``: whatever is in force.
    """

    def __init__(self, client: AsyncInferenceClient, caller: PolicyCaller, mode: str | None) -> None:
        self._client = client
        self._caller = caller
        self._mode = None if mode is None else InteractionType(mode)
        self._request: TensorDict | None = None

    def begin(self, row: int) -> Sequence[Array]:
        """Make the request."""
        self._request = self._caller.request(None)
        return self._caller.states

    async def __call__(self, row: int) -> Answer:
        """Ask the server; where its queue is full, again in a moment."""
        while True:
            # Not in force while this is suspended: a mode belongs to the thread, and so to all tasks of its event loop.
            with nullcontext() if self._mode is None else requests_carry(self._mode):
                future = self._client.submit(self._request)
            try:
                reply = await future
            except ServerOverloadedError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            received, versions = self._caller.read(reply, None)
            return received, 0, int(versions[0])


def is_short(policy: LocalPolicy, caller: PolicyCaller) -> bool:
    """Whether a pass over all rows takes so little time that it may block an event loop.

    Args:
        policy: a copy that does nothing else.
        caller: makes the request, of whatever the rows contain. The replies are thrown away.
    """
    everyone = np.arange(caller.size)
    with torch.random.fork_rng(devices=[]):
        for _ in range(_TRIALS):  # the first pass has more to do than others
            request = caller.request(everyone)
            began = perf_counter()
            policy(request)
            if perf_counter() - began < LONGEST_PASS:
                return True
    return False


class _Tick:
    """What is asked within one tick of the event loop, and the answer."""

    __slots__ = ("error", "received", "rows", "version")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.received: Sequence[Array] = ()
        self.version = 0
        self.error: BaseException | None = None


class TickPolicy:
    """A policy that runs in the event loop, once for all tasks that ask it within a tick. That loop's thread only.

    A pass blocks the loop. A server would leave it free, but a request to one takes more processor time than the pass
    of a small policy, and two changes of threads: short passes delay the tasks less than that does.

    Args:
        compute: answers requests of any number of rows, which it may change.
        caller: makes the requests, whose rows are those of all environments of the loop.
    """

    def __init__(self, compute: Callable[[TensorDict], TensorDictBase], caller: PolicyCaller) -> None:
        self._compute = compute
        self._caller = caller
        self._tick: _Tick | None = None

    def begin(self, row: int) -> Sequence[Array]:
        """Let the states be those of the next step."""
        self._caller.advance(row)
        return self._caller.states

    async def __call__(self, row: int) -> Answer:
        """Ask with the other tasks of this tick.

        Raises:
            BaseException: what the policy has raised.
        """
        tick = self._tick
        if tick is None:
            tick = self._tick = _Tick()
            asyncio.get_running_loop().call_soon(self._answer)
        index = len(tick.rows)
        tick.rows.append(row)
        # Callbacks run in the order in which they were scheduled, so that this task goes on behind the pass.
        await asyncio.sleep(0)
        if tick.error is not None:
            raise tick.error
        return tick.received, index, tick.version

    def _answer(self) -> None:
        tick, self._tick = self._tick, None
        assert tick is not None
        try:
            rows = np.array(tick.rows)
            tick.received, versions = self._caller.read(self._compute(self._caller.request(rows)), rows)
            tick.version = int(versions[0])
        except BaseException as error:  # it belongs to those who asked
            tick.error = error


_RETRY_SECONDS = 0.002
LONGEST_PASS = 0.001
"""Seconds. With an MLP of two layers a pass takes a tenth of it."""
_TRIALS = 4
